#!/usr/bin/env bash
# Does pre-training help? No pre-training, MLM, RetroMAE and DupMAE, each on the same texts for the same steps, then the same fine-tuning;
# MRR@10 and Recall@100 on the set trained on, NDCG@10 on sets never seen, over several seeds, BM25 beside.
#
#   examples/method.sh DATA OUTPUT [OTHER…]     DATA, OTHER: folders in BEIR's layout; DATA with qrels/train.tsv and qrels/dev.tsv
#
# MODEL: a folder or hub name to start from; without it a small BERT starts from scratch. BESIDE: a model to judge as it is.
# SEEDS="1 2 3", ARMS="none mlm retromae dupmae". What is in OUTPUT is not made again. The table is OUTPUT/table.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 out=$2
shift 2
others=("$@")
engine=${ENGINE:-retromae-engine}
seeds=${SEEDS:-1 2 3} arms=${ARMS:-none mlm retromae dupmae}
tokenizer=${TOKENIZER:-${MODEL:-$here/../assets/demo}}
pretrain=${PRETRAIN:---batch-size 32 --epochs 1 --learning-rate 7e-4 --warmup-steps 100}
tune=${TUNE:---batch-size 32 --steps 500 --learning-rate 3e-4 --warmup-steps 50}
precision=${PRECISION:-auto}
mkdir -p "$out"
config=${CONFIG:-$out/config.json}
[ -n "${MODEL:-}" ] || [ -e "$config" ] ||
    echo '{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 6000, "hidden_size": 256, "num_hidden_layers": 4,
"num_attention_heads": 8, "intermediate_size": 1024, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu"}' >"$config"
start=(--config-file "$config")
[ -z "${MODEL:-}" ] || start=(--model "$MODEL")

# make PATH COMMAND…: runs the command unless OUT/PATH is there.
make() {
    local path=$1
    shift
    [ ! -e "$out/$path" ] || return 0
    echo "+ $*" >&2
    "$@" >&2
}
file() { for f in "$1.jsonl" "$1.jsonl.gz"; do [ ! -e "$f" ] || { echo "$f"; return; }; done
    echo "error: $1.jsonl: does not exist, nor $1.jsonl.gz; name a data set in BEIR's layout" >&2; exit 1; }
corpus=$(file "$data/corpus") queries=$(file "$data/queries")
make corpus "$engine" tokenize --input "$corpus" --tokenizer "$tokenizer" --output "$out/corpus" \
    --max-length "${PASSAGE_LENGTH:-128}" --keep-duplicates -q
make queries "$engine" tokenize --input "$queries" --tokenizer "$tokenizer" --output "$out/queries" \
    --max-length "${QUERY_LENGTH:-32}" --keep-duplicates -q

# judge NAME MODEL: figures of a model on the dev set, and on the others.
judge() {
    make "judged/$1/dev.json" "$engine" beir --model "$2" --data "$data" --split dev --output "$out/judged/$1/dev" \
        --top-k 100 --precision "$precision" --json "$out/judged/$1/dev.json" -q
    local other
    for other in "${others[@]}"; do
        make "judged/$1/$(basename "$other").json" "$engine" beir --model "$2" --data "$other" --top-k 100 \
            --output "$out/judged/$1/$(basename "$other")" --precision "$precision" --json "$out/judged/$1/$(basename "$other").json" -q
    done
}
# figure FILE NAME: a number of a JSON file.
figure() { LC_ALL=C awk -v name="\"$2\":" '$1 == name { sub(/,$/, "", $2); print $2; exit }' "$1"; }
# row LABEL JSON…: mean and spread (standard deviation over seeds) of MRR@10 and Recall@100 here, of NDCG@10 elsewhere.
row() {
    local label=$1 folder cells
    shift
    printf '| %s |' "$label"
    for cell in dev:mrr@10 dev:recall@100 $(for other in "${others[@]}"; do echo "$(basename "$other"):ndcg@10"; done); do
        for folder in "$@"; do figure "$out/judged/$folder/${cell%%:*}.json" "${cell#*:}"; done | LC_ALL=C awk '
            { n++; sum += $1; squares += $1 * $1 }
            END { mean = sum / n; spread = n > 1 ? sqrt((squares - n * mean * mean > 0 ? squares - n * mean * mean : 0) / (n - 1)) : 0
                  if (n > 1) printf " %.4f ± %.4f |", mean, spread; else printf " %.4f |", mean }'
    done
    echo
}
table() {
    printf '| pre-trained by | MRR@10 | Recall@100 |'
    for other in "${others[@]}"; do printf ' NDCG@10 of %s |' "$(basename "$other")"; done
    printf '\n| --- | ---: | ---: |'
    for other in "${others[@]}"; do printf ' ---: |'; done
    echo
    local arm seed folders
    for arm in $arms; do
        folders=()
        for seed in $seeds; do [ ! -e "$out/judged/$arm-$seed" ] || folders+=("$arm-$seed"); done
        row "$arm" "${folders[@]}"
    done
    row BM25 bm25
    [ -z "${BESIDE:-}" ] || row "$(basename "$BESIDE"), as it is" beside
}

# Words alone, and a model that someone else trained.
words() {
    make "judged/bm25/$1.trec" "$engine" bm25 --queries "$(file "$2/queries")" --corpus "$(file "$2/corpus")" --top-k 100 \
        --output "$out/judged/bm25/$1.trec" -q
    make "judged/bm25/$1.json" "$engine" evaluate --run "$out/judged/bm25/$1.trec" --qrels "$2/qrels/$3.tsv" \
        --metrics mrr@10,ndcg@10,recall@100 --json "$out/judged/bm25/$1.json" -q
}
mkdir -p "$out/judged/bm25"
words dev "$data" dev
for other in "${others[@]}"; do words "$(basename "$other")" "$other" test; done
[ -z "${BESIDE:-}" ] || { mkdir -p "$out/judged/beside"; judge beside "$BESIDE"; }

for seed in $seeds; do
    for arm in $arms; do
        name=$arm-$seed from=("${start[@]}")
        if [ "$arm" != none ]; then
            # shellcheck disable=SC2086 # options are words
            make "pre/$name/model" "$engine" train "${start[@]}" --objective "$arm" --data "$out/corpus" --output "$out/pre/$name" \
                --precision "$precision" --seed "$seed" --eval-every 0 $pretrain
            from=(--model "$out/pre/$name/model")
        fi
        # shellcheck disable=SC2086
        make "tuned/$name/model" "$engine" train "${from[@]}" --objective contrastive --queries "$out/queries" --corpus "$out/corpus" \
            --qrels "$data/qrels/train.tsv" --output "$out/tuned/$name" --pooling cls --normalize --temperature 0.05 \
            --precision "$precision" --seed "$seed" --eval-every 0 $tune
        mkdir -p "$out/judged/$name"
        judge "$name" "$out/tuned/$name/model"
    done
    table >"$out/table.md"
done
cat "$out/table.md"
