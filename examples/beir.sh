#!/usr/bin/env bash
# NDCG@10 of a model on data sets in BEIR's layout, as BEIR computes it.
#
#   examples/beir.sh MODEL DATA… 
#
# Where a folder DATA is missing and a network is there, the set of that name is downloaded beside it.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
engine=${ENGINE:-retromae-engine}
model=$1
shift
for set in "$@"; do
    [ ! -e "$set" ] || continue
    name=$(basename "$set")
    url=https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/$name.zip
    echo "+ fetching $url" >&2
    curl -fL --retry 3 -C - -o "$set.zip.part" "$url" || { echo "error: $set: does not exist and cannot be fetched from $url; unpack the data set there" >&2; exit 1; }
    mv "$set.zip.part" "$set.zip"
    unzip -q "$set.zip" -d "$(dirname "$set")"
done
"$engine" beir --model "$model" --data "$@" --split "${SPLIT:-test}" --max-length "${MAX_LENGTH:-256}" --json beir.json
