#!/usr/bin/env bash
# RetroMAE's published recipe on MS MARCO passages: a published encoder (or one pre-trained here), two rounds of fine-tuning, a
# cross-encoder, distillation.
#
#   examples/msmarco.sh DATA [OUTPUT]
#
# DATA is BEIR's copy of MS MARCO (https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/msmarco.zip, unpacked): corpus.jsonl,
# queries.jsonl, qrels/train.tsv, qrels/dev.tsv. MODEL is the published checkpoint by default, so pre-training goes on from it for no
# step; MODEL=bert-base-uncased PRETRAIN="--epochs 1 …" pre-trains on the passages first. RANKS=8 trains on eight GPUs with negatives
# across them, at the same batch a step.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
export MODEL=${MODEL:-Shitao/RetroMAE_MSMARCO} SPLIT=${SPLIT:-dev} QUERY_LENGTH=32 PASSAGE_LENGTH=144
ranks=${RANKS:-1}
each=$((64 / ranks)) many=
[ "$ranks" = 1 ] || many="--gpus $ranks --cross-device-negatives"
export PRETRAIN=${PRETRAIN:-"--steps 1 --batch-size 1 --learning-rate 1e-30"}
export FIRST="--batch-size $each $many --group-size 8 --negatives-depth 200 --epochs 4 --learning-rate 2e-5"
export SECOND="--batch-size $each $many --group-size 16 --negatives-depth 200 --epochs 4 --learning-rate 1e-5"
export CROSS="--batch-size 16 --group-size 16 --epochs 2 --learning-rate 2e-5"
export DISTIL="--batch-size $each $many --group-size 16 --epochs 4 --learning-rate 1e-5"
export SCORING="--pooling cls --temperature 1" DEPTH=200
exec "$here/chain.sh" "$1" "${2:-msmarco-run}"
