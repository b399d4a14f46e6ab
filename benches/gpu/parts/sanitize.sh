# Bad memory accesses, races, reads of nothing, wrong barriers. Sourced by run.sh.
# shellcheck shell=bash disable=SC2154 # variables of run.sh

# sanitize [TOOL]: one tool over all kernels, or all tools over what a step launches.
sanitize() {
    facts
    local tools=(memcheck racecheck synccheck initcheck) families=(ops attention)
    if [ -n "${1:-}" ]; then
        tools=("$1") families=(ops attention enhanced_decoding cross_entropy contrastive layernorm gather embed optimizer pool activation)
    fi
    if [ "$device" != cuda ]; then
        left_out "the sanitizer" "compute-sanitizer needs a GPU; the emulator's own checkers run in cargo test"
        tools=(none) families=(layernorm)
    elif ! command -v compute-sanitizer >/dev/null; then
        left_out "the sanitizer" "compute-sanitizer is not here"
        return 1
    fi
    # The time is shared out evenly; what one does not use, later ones get.
    local jobs=$((${#tools[@]} * (${#families[@]} + 1))) tool family
    for tool in "${tools[@]}"; do
        sanitized "$tool" "step head32/retromae" "$jobs" "$engine" step --objective retromae \
            --model tests/golden/head32/retromae/model --batch tests/golden/head32/retromae/batch.safetensors \
            --output "$work/step-$tool.safetensors" --device "$device" --precision bf16
        jobs=$((jobs - 1))
        for family in "${families[@]}"; do
            sanitized "$tool" "$family" "$jobs" "$pack/tests/kernels" "$family::" --test-threads=1
            jobs=$((jobs - 1))
        done
    done
}

# sanitized TOOL NAME JOBS COMMAND...: a row with what the tool found, as one of so many that are still to come. Time being up is no
# finding: what was run until then counts.
sanitized() {
    local tool=$1 name=$2 limit=$(($(left) / $3)) began=$SECONDS rc=0 found ran
    shift 3
    # Too little for a program to start in helps nobody: the last ones then go without.
    if [ "$limit" -lt 20 ]; then limit=$(($(left) < 20 ? $(left) : 20)); fi
    if [ "$limit" -lt 3 ]; then
        row "$tool: $name" "not run" 0 "the time was used up"
        return 0
    fi
    local under=()
    if [ "$tool" != none ]; then under=(compute-sanitizer --tool "$tool" --error-exitcode 99); fi
    printf '\n== %s: %s, for at most %s s\n' "$tool" "$name" "$limit" >>"$log"
    timeout -k 5 "$limit" "${libraries[@]}" "${under[@]}" "$@" >"$said" 2>&1 </dev/null || rc=$?
    cat "$said" >>"$log"
    found=$(grep -aE '(ERROR|RACECHECK) SUMMARY' "$said" | tail -n 1 | sed 's/^=* *//' || true)
    ran=$(grep -acE '^test .*\.\.\. ok' "$said" || true)
    case $rc in
        0) row "$tool: $name" clean $((SECONDS - began)) "$found${found:+; }$ran tests" ;;
        124 | 137) row "$tool: $name" "in part" $((SECONDS - began)) "$ran tests in $limit s; $(grep -acE '^=+ (Error|Invalid|Race|Uninit|Barrier)' "$said" || true) findings until then" ;;
        *) row "$tool: $name" "FAILED ($rc)" $((SECONDS - began)) "${found:-$(detail)}" ;;
    esac
}
