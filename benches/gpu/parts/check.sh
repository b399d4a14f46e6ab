# Does it compute what it must? Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

# check [STAGE]: all stages, or one of them. Stages may run side by side: they share the GPU, and no files.
check() {
    facts
    try doctor 60 "${libraries[@]}" "$engine" doctor --json "$raw/doctor.json" || true
    grep -aE '^(ok|--) ' "$said" >>"$work/tables" || true
    local stage
    for stage in ${1:-flash losses rows graph tuning golden training}; do "$stage"; done
}

# Kernels against the CPU's ops, on this device, in three groups. All tests of a process share its one GPU, and ops their temporary
# memory on it. The emulator's runs are part of every test run on any machine; there they only show that the script works.
families() {
    local what=$1
    shift
    [ "$device" = cuda ] || set -- layernorm
    try "kernels against the CPU's ops: $what" 240 "${libraries[@]}" "$pack/tests/kernels" --test-threads=1 "$@" || true
}
flash() { families "attention" attention:: enhanced_decoding::; }
losses() { families "losses and top-k" cross_entropy:: bag_of_words:: contrastive:: topk::; }
rows() {
    families "the rest" --skip attention:: --skip enhanced_decoding:: --skip cross_entropy:: --skip bag_of_words:: --skip contrastive:: \
        --skip topk::
}

# Primitives and graph against the CPU; what the primitives gave is kept for tests/golden/conformance.
graph() {
    local serial=(--test-threads=1) everything records=$work/conformance
    try "primitives, recorded" 60 "${libraries[@]}" RETROMAE_RECORD="$records" "$pack/tests/emulator" "${serial[@]}" primitives || true
    [ ! -d "$records" ] || tar -C "$records" -czf "$raw/conformance.tar.gz" .
    try "graph against golden cases" 60 "${libraries[@]}" "$pack/tests/graph" "${serial[@]}" || true
    everything=(gpu::)
    [ "$device" = cuda ] || everything=(gpu::f32)
    try "steps against the CPU's" 90 "${libraries[@]}" "$pack/tests/graph_invariants" "${serial[@]}" "${everything[@]}" || true
    try "step contract" 30 "${libraries[@]}" "$pack/tests/step" || true
}

# Training over pairs and reranking: golden cases, the CPU's losses, runs that are killed and go on to the same bits. Tests that need
# no GPU stay at home.
tuning() {
    local serial=(--test-threads=1) golden=(golden::bi_encoders_on_a_gpu golden::cross_encoders invariants:: joined::)
    local tuned=(tuned::a_ tuned::kills)
    [ "$device" = cuda ] || golden=(golden::bi_encoders_on_a_gpu_in_bf16) tuned=(tuned::a_bi_encoder)
    try "fine-tuning against golden cases" 60 "${libraries[@]}" "$pack/tests/finetune" "${serial[@]}" "${golden[@]}" || true
    try "scores of a reranker" 30 "${libraries[@]}" "$pack/tests/rerank" "${serial[@]}" scores:: a_gpu_gives_the_same_scores || true
    try "runs over pairs, also killed" 120 "${libraries[@]}" "$pack/tests/train" "${serial[@]}" "${tuned[@]}" || true
}

# Golden cases through the program; judged in Python against PyTorch's own error in bf16.
golden() {
    local case precision objective made=$work/golden
    mkdir -p "$made"
    for case in head32/mlm head32/retromae head64/retromae head32/dupmae; do
        objective=${case#*/}
        for precision in fp32 bf16; do
            try "step $case $precision" 30 "${libraries[@]}" "$engine" step --objective "$objective" --model "tests/golden/$case/model" \
                --batch "tests/golden/$case/batch.safetensors" --output "$made/${case/\//-}-$precision.safetensors" \
                --device "$device" --precision "$precision" || true
        done
    done
    if ! has_torch; then
        left_out "golden cases against PyTorch" "$python has no torch, transformers and safetensors"
        return
    fi
    try "golden cases against PyTorch" 120 "$python" "$here/golden.py" --cases tests/golden --made "$made" \
        --reference "$pack/reference" --json "$raw/golden.json" || true
    grep -aE '^\|' "$said" >>"$work/tables" || true
}

# Short runs: the same bits twice, and beside the CPU's losses.
training() {
    local steps=60 shards=$work/shards runs=$work/runs
    [ "$device" = cuda ] || steps=3
    mkdir -p "$runs"
    try "tokenize debian" 60 "$engine" tokenize --input "$pack/data/debian/corpus.jsonl.gz" --tokenizer assets/demo --output "$shards" \
        --max-length 128 --keep-duplicates || return 0
    # run NAME DEVICE PRECISION
    run() {
        try "train $steps steps: $1, $2 $3" 90 "${libraries[@]}" "$engine" train --objective retromae --config-file assets/demo/config.json \
            --data "$shards" --output "$runs/$1" --batch-size 32 --steps "$steps" --warmup-steps 10 --learning-rate 1e-3 --eval-every 0 \
            --eval-size 64 --log-every 1 --save-every 0 --tensorboard false --seed 1 --device "$2" --precision "$3" || true
    }
    run cpu cpu fp32
    run fp32 "$device" fp32
    run first "$device" bf16
    run second "$device" bf16
    try "losses, and bits of both runs" 30 "$python" "$here/tables.py" runs --like "$runs/cpu" --within 0.02 --same "$runs/first" "$runs/second" \
        "$runs/cpu" "$runs/fp32" "$runs/first" "$runs/second" || true
    grep -aE '^\|' "$said" >>"$work/tables" || true
    for run in cpu fp32 first second; do
        [ ! -f "$runs/$run/metrics.jsonl" ] || sed "s/^{/{\"run\":\"$run\",/" "$runs/$run/metrics.jsonl"
    done >"$raw/training.jsonl"
}
