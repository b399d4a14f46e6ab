# Steps of the engine and of PyTorch in turn, at equal work. Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

bench() {
    local workload=${1:-full512} json=$raw/steps.jsonl size=(--model base) steps=30 peer=(--device cuda)
    facts
    rm -f "$json"
    # What torch.compile has made is found again by the next process.
    export TORCHINDUCTOR_CACHE_DIR=$root/target/gpu-inductor
    if [ "$device" != cuda ]; then
        size=(--model mini) steps=2
        peer=(--device cpu --no-compile)
    fi
    ours() {
        try "engine $workload $1" 60 "${libraries[@]}" "$engine" bench step --device "$device" --precision bf16 "${size[@]}" --workload "$workload" \
            --steps "$steps" --json "$json" || true
    }
    theirs() {
        if has_torch; then
            try "PyTorch $2 $workload $1" "$3" "$python" "$pack/peers/torch_peer.py" --mode "$2" --workload "$workload" "${size[@]}" \
                --steps "$steps" --json "$json" "${peer[@]}" || true
        else
            left_out "PyTorch $2 $workload $1" "$python has no torch"
        fi
    }
    # A B A B, so that a drift of the clocks shows; the first of PyTorch compiles.
    ours 1
    theirs 1 varlen 150
    theirs 1 compiled 150
    ours 2
    theirs 2 varlen 80
    theirs 2 compiled 80
    theirs 1 seed 60
    ours 3
    try "ratios" 20 "$python" "$here/tables.py" steps "$json" || true
    cat "$said" >>"$work/tables"
}
