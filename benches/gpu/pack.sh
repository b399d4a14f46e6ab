#!/usr/bin/env bash
# Packs what run.sh needs on a machine with a GPU and without cargo or network: .gpu/pack.tar.xz, and .gpu/BUILD.txt, which says what
# is in it. Programs and tests are built with nvcc; texts, baselines and reference come from the shared folder beside the repository.
#
#   benches/gpu/pack.sh          (NVCC, CUDA_HOME or VIRTUAL_ENV name an nvcc; SHARED another shared folder)
set -euo pipefail
cd "$(dirname "$0")/../.."

tests=(kernels emulator graph graph_invariants step finetune rerank train)
limit_mib=60
shared=${SHARED:-$(git rev-parse --path-format=absolute --git-common-dir)/../../shared}
[ -d "$shared/peers" ] || { echo "error: $shared: no shared folder with peers, reference and data; set SHARED" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wanted=()
for name in "${tests[@]}"; do wanted+=(--test "$name"); done
cargo build --release --bin retromae-engine
cargo test --release --no-run "${wanted[@]}" --message-format=json-render-diagnostics >"$work/messages"

# Kind, name and path of every program that cargo made, and the folder of what the build script made.
python3 - "$work/messages" >"$work/made" <<'PYTHON'
import json, sys
for line in open(sys.argv[1]):
    message = json.loads(line)
    if message["reason"] == "build-script-executed" and "retromae-engine" in message["package_id"]:
        print("out", "-", message["out_dir"])
    elif message.get("executable") and "retromae-engine" in message["package_id"]:
        print(message["target"]["kind"][0], message["target"]["name"], message["executable"])
PYTHON
made() { awk -v kind="$1" -v name="$2" '$1 == kind && $2 == name { found = $3 } END { print found }' "$work/made"; }

report=$(made out -)/kernels-report.txt
[ -s "$report" ] || { echo "error: built without nvcc; set NVCC, CUDA_HOME or VIRTUAL_ENV to one that has it" >&2; exit 1; }

pack=$work/pack
mkdir -p "$pack"/{bin,tests,peers,reference,data}
install_stripped() { install -m 755 "$1" "$2" && strip "$2"; }
install_stripped target/release/retromae-engine "$pack/bin/retromae-engine"
for name in "${tests[@]}"; do install_stripped "$(made test "$name")" "$pack/tests/$name"; done
cp "$report" "$pack/kernels-report.txt"
cp "$shared"/peers/* "$pack/peers/"
cp "$shared"/reference/* "$pack/reference/"
cp -r "$shared"/data/{debian,cranfield} "$pack/data/"
chmod -R u+w "$pack"

{
    echo "root=$PWD"
    echo "commit=$(git rev-parse HEAD)$([ -z "$(git status --porcelain --untracked-files=no)" ] || echo ' with uncommitted changes')"
    echo "built=$(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "nvcc=$(grep -hm 1 -o 'Cuda compilation tools.*' "$(made out -)"/ptx/*.ptx | head -n 1)"
    echo "rustc=$(rustc --version)"
    echo "libc=$(ldd --version | head -n 1)"
    (cd "$pack" && find bin tests -type f | sort | xargs sha256sum)
} >"$pack/BUILD.txt"

rm -rf .gpu
mkdir .gpu
# The programs share most of their content, and -9 looks back far enough to see it.
tar -C "$pack" -c . | xz "-${XZ:-9}" >.gpu/pack.tar.xz
cp "$pack/BUILD.txt" .gpu/BUILD.txt

# What travels: this folder, and every file of the tree that git does not ignore.
packed=$(stat -c %s .gpu/pack.tar.xz)
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s 2>/dev/null | awk '{ n += $1 } END { print n }')
mib() { awk -v n="$1" 'BEGIN { printf "%.1f", n / 1048576 }'; }
cat .gpu/BUILD.txt
ls -l "$pack"/bin "$pack"/tests
echo "packed $(mib "$packed") MiB, tree $(mib "$tree") MiB, together $(mib $((packed + tree))) MiB of $limit_mib"
[ $((packed + tree)) -le $((limit_mib << 20)) ] || { echo "error: too large to travel; leave something out" >&2; exit 1; }
