# Where the time of a step goes, stage by stage and kernel by kernel, and hardware counters of these kernels. Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

profile() {
    local counters=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
    counters+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
    counters+=,launch__registers_per_thread,launch__occupancy_limit_registers,launch__occupancy_limit_shared_mem
    counters+=,l1tex__data_bank_conflicts_pipe_lsu.sum,sm__inst_executed_pipe_tensor.sum
    facts
    local workload size=base steps=10
    [ "$device" = cuda ] || { size=mini steps=2; }
    for workload in full512 passages finetune; do
        try "breakdown of $workload" 60 "${libraries[@]}" "$engine" bench step --device "$device" --precision bf16 --model "$size" \
            --workload "$workload" --steps "$steps" --breakdown --json "$raw/breakdown.jsonl" --svg "$raw/step-$workload.svg" || true
        grep -aE '^(\||step |warning)' "$said" >>"$work/tables" || true
    done
    if [ "$device" != cuda ]; then
        left_out "ncu" "it needs a GPU"
        try "the program that it would watch" 120 "${libraries[@]}" "$engine" bench kernels --device emulator --repeats 1 --only layernorm || true
        return
    fi
    if ! command -v ncu >/dev/null; then
        left_out "ncu" "it is not here"
        return
    fi
    # Every launch is run several times over, so there are few of them; the clocks stay as they are.
    local family
    for family in attention "enhanced decoding" layernorm gelu "LM head" embed AdamW; do
        try "ncu: $family" 75 "${libraries[@]}" ncu --clock-control none --csv --metrics "$counters" --launch-count 60 \
            --kernel-name "regex:$(kernels_of "$family")" "$engine" bench kernels --device cuda --repeats 1 --copies 1 --only "$family" || true
        grep -a '^"' "$said" >>"$raw/ncu.csv" || true
    done
    try "counters" 20 "$python" "$here/counters.py" "$raw/ncu.csv" || true
    cat "$said" >>"$work/tables"
}

# Names of the entry points of a family.
kernels_of() {
    case $1 in
        "enhanced decoding") echo '^enhanced_decoding' ;;
        "LM head") echo '^cross_entropy' ;;
        gelu) echo '^activation' ;;
        AdamW) echo '^adamw' ;;
        *) echo "^$1" ;;
    esac
}
