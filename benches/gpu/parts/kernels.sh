# Single kernels of the engine and of PyTorch. Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

kernels() {
    local json=$raw/kernels.jsonl size=base peer=(--device cuda --budget 240)
    facts
    rm -f "$json"
    if [ "$device" != cuda ]; then
        size=mini
        peer=(--device cpu --only "device copy")
    fi
    try "kernels, bf16" 180 "${libraries[@]}" "$engine" bench kernels --device "$device" --precision bf16 --model "$size" --json "$json" || true
    grep -aE '^(\||product)' "$said" >"$work/kernels" || true
    if has_torch; then
        try "PyTorch's kernels" 270 "$python" "$pack/peers/torch_peer.py" --micro --json "$json" "${peer[@]}" || true
    else
        left_out "PyTorch's kernels" "$python has no torch"
    fi
    cat "$work/kernels" >>"$work/tables"
    echo >>"$work/tables"
    try "ratios" 20 "$python" "$here/tables.py" kernels "$json" || true
    cat "$said" >>"$work/tables"
}
