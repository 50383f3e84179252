#!/usr/bin/env bash
# Train the starter editor as it is shipped:  recipes/starter.sh DATA_DIR RUN TRUNK_CACHE_DIR [--resume] [--seed N]
# DATA_DIR holds the files that benchmarks/prepare/data.py checks.
set -euo pipefail
here=$(dirname "$0") data=$1 run=$2 cache=$3
mkdir -p "$cache"
python "$here/../benchmarks/prepare/questions.py" --data-dir "$data" --out "$cache/nq-requests.jsonl"
zsre="zsre:$data/zsre-train.json"
mendlm train --model starter --config "$here/starter.toml" --out "$run" --trunk-cache "$cache" \
    --data "counterfact:$data/counterfact-train.json" --data "$zsre" --data "$zsre" --data "$zsre" \
    --data "records:$cache/nq-requests.jsonl" \
    --locality "nq:$data/nq-open-dev.jsonl" --locality "text:$data/wikitext-2-a.txt" "${@:4}"
