#!/usr/bin/env bash
# The whole chain on Debian's package descriptions and their one-line synopses, from scratch, at a size for a CPU.
#
#   examples/debian.sh DATA [OUTPUT]          DATA: a folder with corpus.jsonl.gz, queries.jsonl.gz and qrels/
#
# SIZE=tiny runs it in ten minutes to see that it works; SIZE=full takes a GPU's BERT-base settings.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
export TOKENIZER=${TOKENIZER:-${MODEL:-$here/../assets/demo}} SCORING="--pooling cls --normalize --temperature 0.05"
# 28 of its passages repeat an id.
export KEEP=
out=${2:-debian-run}
mkdir -p "$out"
if [ -z "${MODEL:-}" ] && [ -z "${CONFIG:-}" ]; then
    export CONFIG=$out/config.json
    echo '{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 6000, "hidden_size": 256, "num_hidden_layers": 4,
"num_attention_heads": 8, "intermediate_size": 1024, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu"}' >"$CONFIG"
fi
case ${SIZE:-small} in
    tiny)
        export PRETRAIN="--batch-size 8 --steps ${STEPS:-20}"
        export FIRST="--batch-size 8 --group-size 2 --steps ${STEPS:-20} --learning-rate 3e-4"
        export CROSS="--batch-size 4 --group-size 2 --steps ${STEPS:-20}"
        export DEV_SAMPLE=500 DEPTH=10 TRAIN_PART=${TRAIN_PART:-40} RERANKED=5
        ;;
    small)
        export PRETRAIN="--batch-size 32 --epochs 1 --learning-rate 7e-4 --warmup-steps 100"
        export FIRST="--batch-size 32 --group-size 2 --steps 300 --learning-rate 3e-4"
        export CROSS="--batch-size 16 --group-size 4 --steps 200 --learning-rate 1e-4"
        export DEV_SAMPLE=4000 DEPTH=10 TRAIN_PART=8 RERANKED=20
        ;;
    full)
        export PRETRAIN="--batch-size 64 --epochs 8 --learning-rate 1e-4"
        export FIRST="--batch-size 64 --group-size 8 --epochs 1 --learning-rate 2e-5"
        export CROSS="--batch-size 32 --group-size 8 --epochs 1 --learning-rate 2e-5"
        ;;
    *) echo "error: SIZE=$SIZE; choose tiny, small or full" >&2; exit 2 ;;
esac
exec "$here/chain.sh" "$1" "$out"
