#!/usr/bin/env bash
# Train the starter editor as it is shipped:  recipes/starter.sh DATA_DIR RUN TRUNK_CACHE_DIR
# DATA_DIR holds the files that benchmarks/prepare/data.py checks. Interrupted, each command goes on with --resume.
set -euo pipefail
data=$1 run=$2 cache=$3
train=(
    mendlm train --model starter --config "$(dirname "$0")/starter.toml" --out "$run" --trunk-cache "$cache"
    --data "counterfact:$data/counterfact-train.json"
    --data "zsre:$data/zsre-train.json" --data "zsre:$data/zsre-train.json" --data "zsre:$data/zsre-train.json"
    --locality "nq:$data/nq-open-dev.jsonl" --locality "text:$data/wikitext-2-a.txt"
)
"${train[@]}"
# A second, shorter stage from where the first ended, in which locality weighs more.
"${train[@]}" --resume --set steps=280 --set locality_weight=6.0
