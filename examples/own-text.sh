#!/usr/bin/env bash
# Adapts a model to a folder of text files and compares before and after. The first line of a file (its title) is a query, the rest its
# passage; every tenth file is kept for the judgement.
#
#   [MODEL=folder-or-hub-name] examples/own-text.sh FOLDER [OUTPUT]
#
# Without MODEL a tiny BERT is trained from scratch, to see how it goes. Sizes: STEPS of pre-training and TUNING of fine-tuning.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 out=${2:-own-text-run}
engine=${ENGINE:-retromae-engine}
[ -d "$folder" ] || { echo "error: $folder: is no folder; name one with .txt files" >&2; exit 1; }
mkdir -p "$out/data/qrels"
find "$folder" -path "$out" -prune -o -name '*.txt' -print | LC_ALL=C sort >"$out/files.txt"
[ -s "$out/files.txt" ] || { echo "error: $folder: holds no .txt file; name a folder with some" >&2; exit 1; }
awk -v data="$out/data" '
    function json(s) { gsub(/\\/, "\\\\", s); gsub(/"/, "\\\"", s); gsub(/[\001-\037]/, " ", s); return s }
    BEGIN { print "query-id\tcorpus-id\tscore" >(data "/qrels/train.tsv"); print "query-id\tcorpus-id\tscore" >(data "/qrels/dev.tsv") }
    {
        file = $0; title = ""; text = ""
        while ((getline line < file) > 0) if (title == "") title = line; else text = text " " line
        close(file)
        if (title == "" || text ~ /^ *$/) { skipped++; next }
        n++
        print "{\"_id\": \"d" n "\", \"text\": \"" json(text) "\"}" >(data "/corpus.jsonl")
        print "{\"_id\": \"q" n "\", \"text\": \"" json(title) "\"}" >(data "/queries.jsonl")
        print "q" n "\td" n "\t1" >(data "/qrels/" (n % 10 == 0 ? "dev" : "train") ".tsv")
    }
    END {
        if (skipped) print skipped " files without a title and a text are left out" >"/dev/stderr"
        if (n < 20) { print "error: " n + 0 " texts with a title are too few; give 20 or more" >"/dev/stderr"; exit 1 }
    }' "$out/files.txt"
export PRETRAIN="--batch-size ${BATCH:-16} --steps ${STEPS:-1000} --learning-rate ${RATE:-1e-4}"
export FIRST="--batch-size ${BATCH:-16} --group-size 2 --steps ${TUNING:-300} --learning-rate ${RATE:-1e-4}"
export CROSS="--batch-size 4 --group-size 2 --steps ${TUNING:-300}" SCORING="--pooling mean --normalize --temperature 0.05" DEPTH=20
if [ -z "${MODEL:-}" ]; then
    export TOKENIZER=$here/../assets/demo CONFIG=$out/config.json
    echo '{"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 6000, "hidden_size": 128, "num_hidden_layers": 2,
"num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu"}' >"$CONFIG"
fi
exec "$here/chain.sh" "$out/data" "$out"
