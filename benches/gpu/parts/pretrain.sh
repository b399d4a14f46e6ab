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

    tune "$runs/pretrain/model"
}

# Fine-tuning on Debian's synopses from the model $1, then encode, search and evaluate.
tune() {
    local model=$1 data=$pack/data/debian set=$work/debian steps=500 batch=64 sets=("$pack/data/cranfield:test")
    [ -d "$model" ] || { left_out "fine-tuning" "there is no pre-trained model"; return 0; }
    mkdir -p "$set/qrels"
    if [ "$device" = cuda ]; then
        cp "$data"/corpus.jsonl.gz "$data"/queries.jsonl.gz "$set/"
        cp "$data"/qrels/*.tsv "$set/qrels/"
    else
        # A rehearsal: the first documents, half of their queries for either split.
        steps=2 batch=4 sets=()
        gzip -dc "$data/corpus.jsonl.gz" | sed -n 1,60p | gzip >"$set/corpus.jsonl.gz"
        gzip -dc "$data/queries.jsonl.gz" | sed -n 1,60p | gzip >"$set/queries.jsonl.gz"
        gzip -dc "$set/queries.jsonl.gz" | sed 's/.*"_id": "\([^"]*\)".*/\1\t\1\t1/' >"$work/all.tsv"
        for split in train dev; do printf 'query-id\tcorpus-id\tscore\n' >"$set/qrels/$split.tsv"; done
        sed -n 1,30p "$work/all.tsv" >>"$set/qrels/train.tsv"
        sed -n '31,$p' "$work/all.tsv" >>"$set/qrels/dev.tsv"
    fi
    for side in corpus queries; do
        try "tokenize $side" 60 "$engine" tokenize --input "$set/$side.jsonl.gz" --tokenizer "$model" --output "$work/$side" \
            --max-length 128 --keep-duplicates || return 0
    done
    try "fine-tune, $steps steps of $batch" 120 "${libraries[@]}" "$engine" train --objective contrastive --model "$model" \
        --queries "$work/queries" --corpus "$work/corpus" --qrels "$set/qrels/train.tsv" --output "$runs/tuned" --batch-size "$batch" \
        --steps "$steps" --learning-rate 2e-4 --normalize --eval-every 0 --tensorboard false --seed 1 --device "$device" || return 0
    [ ! -f "$runs/tuned/metrics.jsonl" ] || cp "$runs/tuned/metrics.jsonl" "$raw/tuned-metrics.jsonl"
    for of in "$model" "$runs/tuned/model"; do
        try "beir debian dev, $(basename "$(dirname "$of")")" 90 "${libraries[@]}" "$engine" beir --model "$of" --data "$set" --split dev \
            --max-length 128 --device "$device" --json "$raw/debian-$(basename "$(dirname "$of")").json" || true
        grep -aE '^(\||debian|set|data)' "$said" >>"$work/tables" || true
        for one in "${sets[@]}"; do
            try "beir ${one##*/}, $(basename "$(dirname "$of")")" 60 "${libraries[@]}" "$engine" beir --model "$of" --data "${one%:*}" \
                --split "${one#*:}" --max-length 128 --device "$device" || true
            grep -aE '^(\||cranfield)' "$said" >>"$work/tables" || true
        done
    done
    # Goal G10: passages a second from text.
    try "encode from text" 90 "${libraries[@]}" "$engine" encode --model "$runs/tuned/model" --input "$set/corpus.jsonl.gz" \
        --output "$work/embeddings" --max-length 128 --device "$device" --json "$raw/encode.json" || true
    tail -n 3 "$said" >>"$work/tables" || true
    local how=()
    [ "$device" = cuda ] || how=(--device cpu --no-compile)
    if has_torch; then
        try "PyTorch encodes the same" 120 "$python" "$here/encode_peer.py" --model "$runs/tuned/model" --input "$set/corpus.jsonl.gz" \
            --max-length 128 --json "$raw/encode-peer.json" "${how[@]}" || true
        tail -n 1 "$said" >>"$work/tables" || true
    else
        left_out "PyTorch encodes the same" "$python has no torch"
    fi
}
