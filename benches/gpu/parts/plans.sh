# Plans of attention side by side, and why they wait. Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

plans() {
    facts
    if [ "$device" != cuda ] || ! command -v nvcc >/dev/null; then
        left_out "plans of attention" "they need a GPU and nvcc"
        return
    fi
    local waits=gpu__time_duration.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active kind
    waits+=,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
    waits+=,lts__t_sectors.avg.pct_of_peak_sustained_elapsed,l1tex__data_bank_conflicts_pipe_lsu.sum
    for kind in long_scoreboard short_scoreboard wait math_pipe_throttle barrier mio_throttle not_selected; do
        waits+=,smsp__average_warps_issue_stalled_${kind}_per_issue_active.ratio
    done
    try "compile" 180 nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I kernels benches/gpu/plans.cu -o "$work/plans" || return 0
    try "plans" 120 "$work/plans" || true
    grep -aE ' ms ' "$said" >"$raw/plans.txt" || true
    cat "$raw/plans.txt" >>"$work/tables"
    if command -v ncu >/dev/null; then
        try "ncu" 120 ncu --clock-control none --csv --metrics "$waits" "$work/plans" once || true
        grep -a '^"' "$said" >"$raw/plans-ncu.csv" || true
        try "counters" 20 "$python" "$here/counters.py" "$raw/plans-ncu.csv" || true
        cat "$said" >>"$work/tables"
    fi
    try "LM head by its chunks" 90 "${libraries[@]}" "$engine" bench kernels --device cuda --precision bf16 --model base --only "LM head" \
        --logits-mib 32,48,64,96,128,192,256,512 --json "$raw/head.jsonl" || true
    grep -aE '^\|' "$said" >>"$work/tables" || true
}
