#!/usr/bin/env bash
# The published chain on a data set in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/train.tsv, qrels/SPLIT.tsv; also .gz):
# tokenize, pre-train, BM25 negatives, fine-tune, mine, fine-tune again, cross-encoder, distil, evaluate.
#
#   [MODEL=folder-or-hub-name] examples/chain.sh DATA OUTPUT
#
# Without MODEL a BERT is trained from scratch with CONFIG and TOKENIZER. What is already in OUTPUT is not made again, so the same command
# goes on where it was stopped. A line a stage is printed last: MRR@10, NDCG@10, Recall@100 of the queries of SPLIT.
set -euo pipefail

[ $# = 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
data=$1 out=$2
engine=${ENGINE:-retromae-engine}
split=${SPLIT:-dev}
model=${MODEL:-}
tokenizer=${TOKENIZER:-$model}
config=${CONFIG:-}
query_length=${QUERY_LENGTH:-32} passage_length=${PASSAGE_LENGTH:-128}
# Options of the trainings, as on the command line.
pretrain=${PRETRAIN:---batch-size 32 --epochs 3 --learning-rate 1e-4}
first=${FIRST:---batch-size 32 --group-size 8 --epochs 3 --learning-rate 2e-5}
second=${SECOND:-$first}
cross=${CROSS:---batch-size 16 --group-size 8 --epochs 1 --learning-rate 2e-5}
distil=${DISTIL:-$second}
# How embeddings are compared. The published models take [CLS] as it is.
scoring=${SCORING:---pooling cls --temperature 1}
depth=${DEPTH:-200}
# RERANKED=N: how many passages of each of the last lists the cross-encoder scores.
# TRAIN_PART=N trains on every Nth judged query only: a cross-encoder has so many fewer pairs to score for its pupil.
part=${TRAIN_PART:-1}
# KEEP= leaves out passages whose id or text was there before; by default all stay.

[ -n "$tokenizer" ] || { echo "error: MODEL or TOKENIZER is not set; name a model, or a tokenizer and a CONFIG" >&2; exit 2; }
mkdir -p "$out"
texts() { for f in "$data/$1.jsonl" "$data/$1.jsonl.gz"; do [ ! -e "$f" ] || { echo "$f"; return; }; done
    echo "error: $data: holds no $1.jsonl or $1.jsonl.gz; name a data set in BEIR's layout" >&2; exit 1; }
corpus=$(texts corpus)
queries=$(texts queries)
for f in train "$split"; do
    [ -e "$data/qrels/$f.tsv" ] || { echo "error: $data/qrels/$f.tsv: does not exist; set SPLIT, or add judgements" >&2; exit 1; }
done
train_qrels=$data/qrels/train.tsv judged=$data/qrels/$split.tsv

# make NAME COMMAND…: runs the command unless OUT/NAME is there.
make() {
    local name=$1
    shift
    [ ! -e "$out/$name" ] || return 0
    echo "+ $*" >&2
    "$@" >&2
}
# train NAME OPTION…: a finished run has exported its model.
train() {
    local name=$1
    shift
    make "$name/model" "$engine" train --output "$out/$name" "$@"
}
# The queries that a qrels file judges, as JSON lines.
judged_queries() {
    local reader=cat
    [ "${queries%.gz}" = "$queries" ] || reader="gzip -dc"
    $reader "$queries" | awk -v qrels="$1" '
        BEGIN { while ((getline line < qrels) > 0) { split(line, f, /[ \t]+/); wanted[f[1]] = 1 } }
        match($0, /"_id": *"[^"]*"/) { id = substr($0, RSTART, RLENGTH); sub(/"_id": *"/, "", id); sub(/"$/, "", id); if (id in wanted) print }' |
        awk -v part="${2:-1}" 'NR % part == 0'
}
# judge NAME MODEL: encode, search, evaluate.
judge() {
    local name=$1 folder=$2
    shift 2
    make "judged/$name/passages/meta.json" "$engine" encode --model "$folder" --kind passage \
        --input "$out/passages" --output "$out/judged/$name/passages" "$@" -q
    make "judged/$name/queries/meta.json" "$engine" encode --model "$folder" --kind query \
        --input "$out/$split-queries" --output "$out/judged/$name/queries" "$@" -q
    make "judged/$name/run.trec" "$engine" search --queries "$out/judged/$name/queries" \
        --corpus "$out/judged/$name/passages" --top-k 1000 --output "$out/judged/$name/run.trec" -q
    figures "$name" "$out/judged/$name/run.trec"
}
figures() {
    "$engine" evaluate --run "$2" --qrels "$judged" --metrics mrr@10,ndcg@10,recall@100 --json "$out/$1.json" -q >/dev/null
    printf '%-28s' "$1" >>"$out/table.txt"
    for metric in mrr@10 ndcg@10 recall@100; do
        LC_ALL=C printf '%12.4f' "$(sed -n "s/.*\"$metric\": *\([0-9.eE-]*\).*/\1/p" "$out/$1.json" | head -1)" >>"$out/table.txt"
    done
    echo >>"$out/table.txt"
}
# lists NAME MODEL: what a model finds for the training queries.
lists() {
    make "$1/passages/meta.json" "$engine" encode --model "$2" --kind passage --input "$out/passages" \
        --output "$out/$1/passages" -q
    make "$1/queries/meta.json" "$engine" encode --model "$2" --kind query --input "$out/train-queries" \
        --output "$out/$1/queries" -q
    make "$1/train.trec" "$engine" search --queries "$out/$1/queries" --corpus "$out/$1/passages" \
        --top-k "$depth" --output "$out/$1/train.trec" -q
}

printf '%-28s%12s%12s%12s\n' stage MRR@10 NDCG@10 Recall@100 >"$out/table.txt"

# Text to shards; queries of the trainings and of the judgement apart.
for side in train "$split"; do
    every=1
    [ "$side" != train ] || every=$part
    [ -e "$out/$side.jsonl" ] ||
        { judged_queries "$data/qrels/$side.tsv" "$every" >"$out/$side.tmp"; mv "$out/$side.tmp" "$out/$side.jsonl"; }
    make "$side-queries" "$engine" tokenize --input "$out/$side.jsonl" --tokenizer "$tokenizer" \
        --output "$out/$side-queries" --max-length "$query_length" --keep-duplicates -q
done
# shellcheck disable=SC2086
make passages "$engine" tokenize --input "$corpus" --tokenizer "$tokenizer" --output "$out/passages" \
    --max-length "$passage_length" ${KEEP---keep-duplicates} -q

if [ "$part" != 1 ]; then
    train_qrels=$out/train-qrels.tsv
    [ -e "$train_qrels" ] || {
        awk 'NR == FNR { match($0, /"_id": *"[^"]*"/); id = substr($0, RSTART, RLENGTH); sub(/"_id": *"/, "", id); sub(/"$/, "", id)
                wanted[id] = 1; next }
            $1 in wanted || $1 == "query-id"' "$out/train.jsonl" "$data/qrels/train.tsv" >"$out/train-qrels.tmp"
        mv "$out/train-qrels.tmp" "$train_qrels"
    }
fi

# Words alone.
make bm25.trec "$engine" bm25 --queries "$out/$split.jsonl" --corpus "$corpus" --output "$out/bm25.trec" -q
figures BM25 "$out/bm25.trec"

# Pre-training goes on from MODEL, or begins from scratch.
start=(--config-file "$config")
[ -z "$model" ] || start=(--model "$model")
[ -z "$model" ] || judge before "$model" ${BEFORE:---pooling mean --normalize}
# shellcheck disable=SC2086 # options are words
train pretrained "${start[@]}" --objective "${OBJECTIVE:-retromae}" --data "$out/passages" $pretrain

pairs=(--queries "$out/train-queries" --corpus "$out/passages" --qrels "$train_qrels")
dev=(--dev-queries "$out/$split-queries" --dev-qrels "$judged" --dev-sample "${DEV_SAMPLE:-10000}" --eval-every 0)

# First round: BM25's negatives.
make bm25-train.trec "$engine" bm25 --queries "$out/train.jsonl" --corpus "$corpus" --top-k "$depth" \
    --output "$out/bm25-train.trec" -q
make bm25-negatives.tsv "$engine" mine --run "$out/bm25-train.trec" --qrels "$train_qrels" \
    --corpus "$out/passages" --ranks "1-$depth" --output "$out/bm25-negatives.tsv" -q
# shellcheck disable=SC2086
train first --objective contrastive --model "$out/pretrained/model" "${pairs[@]}" \
    --negatives "$out/bm25-negatives.tsv" $scoring $first "${dev[@]}"
judge first-round "$out/first/model"

# Second round: its own.
lists first-lists "$out/first/model"
make negatives.tsv "$engine" mine --run "$out/first-lists/train.trec" --qrels "$train_qrels" \
    --corpus "$out/passages" --ranks "2-$depth" --output "$out/negatives.tsv" -q
# shellcheck disable=SC2086
train second --objective contrastive --model "$out/pretrained/model" "${pairs[@]}" \
    --negatives "$out/negatives.tsv" $scoring $second "${dev[@]}"
judge second-round "$out/second/model"

# A cross-encoder on these negatives, its scores, and what a bi-encoder learns from them.
# shellcheck disable=SC2086
train cross --objective cross-encoder --model "$out/pretrained/model" "${pairs[@]}" \
    --negatives "$out/negatives.tsv" --max-length "$((query_length + passage_length))" $cross --eval-every 0
[ -e "$out/pairs.tsv" ] || {
    {
        awk '{ n = split($0, f, /[ \t]+/); grade = f[n]; if (grade + 0 > 0) print f[1] "\t" (n > 3 ? f[3] : f[2]) }' "$train_qrels"
        awk -F'\t' '{ n = split($2, p, ","); for (i = 1; i <= n; i++) print $1 "\t" p[i] }' "$out/negatives.tsv"
    } | awk 'NR == FNR { wanted[$1] = 1; next } $1 in wanted' "$out/negatives.tsv" - | sort -s -k1,1 >"$out/pairs.tmp"
    mv "$out/pairs.tmp" "$out/pairs.tsv"
}
make scores.tsv "$engine" rerank --model "$out/cross/model" --pairs "$out/pairs.tsv" \
    --queries "$out/train-queries" --corpus "$out/passages" --output "$out/scored.trec" \
    --scores "$out/scores.tsv" -q
# shellcheck disable=SC2086
train distilled --objective contrastive --model "$out/pretrained/model" "${pairs[@]}" \
    --negatives "$out/negatives.tsv" --teacher-scores "$out/scores.tsv" --contrastive-loss-weight 1 \
    $scoring $distil "${dev[@]}"
judge distilled "$out/distilled/model"
make reranked.trec "$engine" rerank --model "$out/cross/model" --run "$out/judged/distilled/run.trec" --top-k "${RERANKED:-50}" \
    --queries "$out/$split-queries" --corpus "$out/passages" --output "$out/reranked.trec" -q
figures distilled+reranked "$out/reranked.trec"
cat "$out/table.txt"
