# Real pre-training on Debian's package descriptions. Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

pretrain() {
    local steps=${STEPS:-500} size=bert-small shards=$work/shards runs=$work/runs batch=8192 every=100 cpu_steps=6
    if [ "$device" != cuda ]; then steps=2 size=bert-tiny batch=256 every=0 cpu_steps=2; fi
    facts
    mkdir -p "$runs"
    try "tokenize debian" 60 "$engine" tokenize --input "$pack/data/debian/corpus.jsonl.gz" --tokenizer assets/demo --output "$shards" \
        --max-length 128 --keep-duplicates || return 0
    # run NAME STEPS DEVICE PRECISION SECONDS: with a warm-up of fixed length, so that runs of different length begin alike.
    run() {
        try "train $size, $2 steps, $3 $4" "$5" "${libraries[@]}" "$engine" train --objective retromae --config-name "$size" --data "$shards" \
            --output "$runs/$1" --tokens-per-batch "$batch" --steps "$2" --warmup-steps 50 --learning-rate 5e-4 --eval-every "$every" \
            --eval-size 500 --log-every 1 --save-every 0 --tensorboard false --seed 1 --device "$3" --precision "$4" || true
    }
    run first-steps-cpu "$cpu_steps" cpu fp32 150
    run pretrain "$steps" "$device" bf16 240
    # Only the beginning must agree: the CPU takes a few steps of the same run.
    try "losses" 20 "$python" "$here/tables.py" runs --like "$runs/first-steps-cpu" --within 0.02 "$runs/first-steps-cpu" "$runs/pretrain" || true
    grep -aE '^\|' "$said" >>"$work/tables" || true
    [ ! -f "$runs/pretrain/metrics.jsonl" ] || cp "$runs/pretrain/metrics.jsonl" "$raw/pretrain-metrics.jsonl"
    if [ -d "$runs/pretrain/model" ]; then
        try "the exported model verifies" 30 "$engine" verify "$runs/pretrain/model" || true
    fi

    # Fine-tuning and judging, in the order of the commands that the engine does not have yet:
    #   train --objective contrastive (Debian's synopses as queries, from $runs/pretrain/model), encode, search, evaluate
    # on $pack/data/debian and $pack/data/cranfield, beside the same in PyTorch.
}
