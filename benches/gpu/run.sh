#!/usr/bin/env bash
# Runs one part of the work on a GPU from what pack.sh packed: see README.md beside this.
#
#   [DEVICE=cuda|emulator] [OUT=folder] [PYTHON=python3] benches/gpu/run.sh check|sanitize|bench|kernels|plans|pretrain|profile [workload]
#
# A part prints a short table last and leaves three files in OUT: PART.txt, PART.log, PART.tar.gz. DEVICE=emulator rehearses the script at tiny sizes on
# a machine without a GPU; what cannot be rehearsed says so in one line.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
here=$root/benches/gpu

part=${1:-}
device=${DEVICE:-cuda}
out=${OUT:-$root/benches/results/gpu-out}
python=${PYTHON:-python3}
# No part may need more than nine minutes; what has not begun by then is left out.
deadline=${BUDGET:-530}
case $part in check | sanitize | bench | kernels | plans | pretrain | profile) ;; *) sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
case $device in cuda | emulator) ;; *) echo "error: DEVICE=$device; choose cuda or emulator" >&2; exit 2 ;; esac

mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
raw=$work/raw
rows=$work/rows
title=$part${2:+-$2}
log=$out/$title.log
mkdir "$raw"
: >"$rows"
: >"$log"

# shellcheck source=benches/gpu/parts/common.sh
. "$here/parts/common.sh"
trap finish EXIT
unpack
# shellcheck source=/dev/null
. "$here/parts/$part.sh"
"$part" "${@:2}"
