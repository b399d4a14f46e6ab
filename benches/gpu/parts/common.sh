# What the parts share. Sourced by run.sh.
# shellcheck shell=bash disable=SC2034,SC2154 # variables of run.sh

# Unpacks .gpu/pack.tar.xz into target/gpu, unless that is there already, and puts the programs where tests expect them.
unpack() {
    pack=$root/target/gpu
    if ! cmp -s "$root/.gpu/BUILD.txt" "$pack/BUILD.txt"; then
        [ -f "$root/.gpu/pack.tar.xz" ] || { echo "error: .gpu/pack.tar.xz is not here; make it with benches/gpu/pack.sh" >&2; exit 1; }
        rm -rf "$pack"
        mkdir -p "$pack"
        # Python unpacks it where there is no xz.
        tar -C "$pack" -xJf "$root/.gpu/pack.tar.xz" 2>/dev/null || "$python" -m tarfile -e "$root/.gpu/pack.tar.xz" "$pack"
    fi
    engine=$pack/bin/retromae-engine
    RETROMAE_COMMIT=$(build_fact commit)
    # What the driver has compiled from PTX is found again by the next program.
    export RETROMAE_COMMIT RETROMAE_DEVICE=$device PYTHONUNBUFFERED=1 CUDA_CACHE_PATH=$root/target/gpu-cuda-cache
    # Tests know the checkout and the program by the paths they were built at.
    mkdir -p "$root/target/release"
    [ -e "$root/target/release/retromae-engine" ] || ln -s ../gpu/bin/retromae-engine "$root/target/release/retromae-engine"
    local built
    built=$(build_fact root)
    if [ ! -e "$built" ]; then
        mkdir -p "$(dirname "$built")"
        ln -s "$root" "$built"
    fi
    [ "$(cd "$built" && pwd -P)" = "$(pwd -P)" ] || echo "note: $built is another checkout; tests read its files" | tee -a "$log"
    # cuBLASLt lies inside Python packages. What uses it is started through this.
    local found
    found=$("$python" - <<'PYTHON' 2>/dev/null || true
import glob, importlib.util
spec = importlib.util.find_spec("nvidia")
print(":".join(p for root in (spec.submodule_search_locations if spec else []) for p in sorted(glob.glob(root + "/*/lib"))))
PYTHON
)
    libraries=(env "LD_LIBRARY_PATH=$found${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
    [ ! -d /usr/local/cuda/bin ] || PATH=$PATH:/usr/local/cuda/bin
}

build_fact() { sed -n "s/^$1=//p" "$pack/BUILD.txt"; }

# Says what cannot be done here.
left_out() {
    echo "left out: $*" | tee -a "$log"
    row "$1" "left out" 0 "${*:2}"
}

has_torch() { "$python" -c 'import torch, transformers, safetensors' 2>/dev/null; }

left() { echo $((deadline - SECONDS)); }

# row NAME RESULT SECONDS DETAIL
row() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$rows"; }

# try NAME SECONDS COMMAND...: runs it for at most so long, its output in the log and in $said; a row of the table tells how it went.
# Ends with the command's own status.
said=$work/said
try() {
    local what=$1 limit=$2 began=$SECONDS rc=0
    shift 2
    if [ "$(left)" -lt "$limit" ]; then limit=$(left); fi
    if [ "$limit" -lt 3 ]; then
        row "$what" "no time" 0
        return 1
    fi
    printf '\n== %s (at %s s, for at most %s s): %s\n' "$what" "$SECONDS" "$limit" "$*" >>"$log"
    timeout -k 5 "$limit" "$@" >"$said" 2>&1 </dev/null || rc=$?
    cat "$said" >>"$log"
    case $rc in
        0) row "$what" ok $((SECONDS - began)) "$(detail)" ;;
        124 | 137) row "$what" "TIME UP" $((SECONDS - began)) "after $limit s; $(detail)" ;;
        *)
            row "$what" "FAILED ($rc)" $((SECONDS - began)) "$(detail)"
            # What failing tests said, for those who see only the end of the output.
            { grep -aE -A 1 'panicked at' "$said" | grep -av '^--$' | cut -c1-200 | head -n 12; } >>"$work/failures" || true
            ;;
    esac
    return "$rc"
}

# The line of the last command's output that says most: the totals of tests, an error, or what it said last.
detail() {
    local line
    line=$(grep -aE '^test result: ' "$said" | tail -n 1 | sed -E 's/^test result: //; s/; finished.*//; s/; 0 (ignored|measured)//g' || true)
    [ -n "$line" ] || line=$(grep -aE '^(error|ERROR|.*panicked at)' "$said" | head -n 1 || true)
    [ -n "$line" ] || line=$(grep -av '^ *$' "$said" | tail -n 1 || true)
    printf '%s' "$line" | tr '\t' ' ' | sed -E 's/^\{"mode".*"ms": ?([0-9.]+),.*"tokens_per_s": ?([0-9]+).*/\1 ms, \2 tokens\/s/; s/^ +//' | cut -c1-150
}

# The machine, its software and the build: in the log and as a row.
facts() {
    {
        cat "$pack/BUILD.txt"
        uname -srm
        grep -m 1 'model name' /proc/cpuinfo || true
        nproc
        if [ "$device" = cuda ]; then
            nvidia-smi
            nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,memory.total \
                --format=csv
            nvcc --version || true
        fi
        "$python" -c 'import sys; print("python", sys.version)'
        "$python" -c 'import torch, transformers; print("torch", torch.__version__, torch.version.cuda, "transformers", transformers.__version__)' ||
            true
    } >"$raw/facts.txt" 2>&1 || true
    local gpu=emulator
    [ "$device" != cuda ] || gpu=$(nvidia-smi --query-gpu=name,driver_version,clocks.sm --format=csv,noheader 2>/dev/null | head -n 1 || echo "no GPU")
    row machine "$device" 0 "$gpu, commit ${RETROMAE_COMMIT:0:12}${RETROMAE_COMMIT:40}"
}

# Prints the tables last, whatever happened.
finish() {
    local rc=$?
    {
        [ ! -s "$work/failures" ] || { echo; cat "$work/failures"; }
        [ ! -s "$work/tables" ] || { echo; cat "$work/tables"; }
        printf '\n%-42s %-12s %5s  %s\n' "$title on $device" result s detail
        awk -F '\t' '{ printf "%-42s %-12s %5s  %s\n", $1, $2, $3, $4 }' "$rows"
        grep -qE $'\t(FAILED|TIME UP|no time)' "$rows" && rc=1
        echo "$SECONDS s in all; more in $out/$title.log and .tar.gz; exit $rc"
    } | tee "$out/$title.txt"
    tar -C "$raw" -czf "$out/$title.tar.gz" .
    grep -qE $'\t(FAILED|TIME UP|no time)' "$rows" && rc=1
    rm -rf "$work"
    exit "$rc"
}
