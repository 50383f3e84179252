#!/usr/bin/env bash
# Train the starter model's editors as they are shipped:  recipes/starter.sh DATA_DIR RUN TRUNK_CACHE_DIR [--seed N]
# DATA_DIR holds the files that benchmarks/prepare/data.py checks. RUN is the starter editor; the first seven of its eight
# trainings lie in RUN-first, RUN-second, RUN-third, RUN-varied, RUN-questions, RUN-statements and RUN-whole, and
# `scripts/ship_editor.py starter RUN 1.07` makes the shipped file of it. RUN-many is starter-many, from RUN-third, by way of
# RUN-together, RUN-both and RUN-longer. What was interrupted goes on when the same command is given again.
set -euo pipefail
here=$(dirname "$0") data=$1 run=$2 cache=$3 options=("${@:4}")

zsre=(--data "zsre:$data/zsre-train.json")

prepare() { # SCRIPT FILE options...
    [ -f "$cache/$2" ] || python "$here/../benchmarks/prepare/$1" --out "$cache/$2" "${@:3}"
}

train() { # RUN CONFIG REQUESTS options...
    local resume=()
    [ ! -f "$1/checkpoint.safetensors" ] || resume=(--resume)
    mendlm train --model starter --config "$here/$2" --out "$1" --trunk-cache "$cache" --data "$3" "${@:4}" \
        --data "records:$cache/nq-requests.jsonl" \
        --locality "nq:$data/nq-open-dev.jsonl" --locality "text:$data/wikitext-2-a.txt" "${resume[@]}" "${options[@]}"
}

mkdir -p "$cache"
prepare questions.py nq-requests.jsonl --data-dir "$data"
prepare continuations.py counterfact-continued.jsonl --data "counterfact:$data/counterfact-train.json"
prepare targets.py zsre-retargeted.jsonl --data-dir "$data"
continued="records:$cache/counterfact-continued.jsonl"
train "$run-first" starter.toml "counterfact:$data/counterfact-train.json" "${zsre[@]}" "${zsre[@]}" "${zsre[@]}"
train "$run-second" starter-continued.toml "$continued" "${zsre[@]}" "${zsre[@]}" "${zsre[@]}" --from "$run-first"
train "$run-third" starter-chat.toml "$continued" "${zsre[@]}" --data "records:$cache/zsre-retargeted.jsonl" --from "$run-second"
both=("${zsre[@]}" --data "records:$cache/zsre-retargeted.jsonl")
train "$run-together" starter-together.toml "$continued" "${both[@]}" --from "$run-third"
train "$run-both" starter-many.toml "$continued" "${both[@]}" --from "$run-together"
train "$run-longer" starter-many.toml "$continued" "${both[@]}" --from "$run-both" --set steps=800
gentler=(--set steps=520 --set learning_rate=5e-4 --set locality_weight=5)
train "$run-many" starter-many.toml "$continued" "${both[@]}" --from "$run-longer" "${gentler[@]}"

# The other requests of the last trainings, with zsRE's own questions more often each time.
prepare varied.py varied.jsonl --data-dir "$data"
prepare varied.py varied-again.jsonl --data-dir "$data" --zsre-copies 2 --seed 1
prepare invented.py invented.jsonl
invented=(--data "records:$cache/invented.jsonl")
again=(--data "records:$cache/varied-again.jsonl" "${invented[@]}" "${both[@]}" "${both[@]}" "${zsre[@]}" "${zsre[@]}")
train "$run-varied" starter-varied.toml "$continued" --data "records:$cache/varied.jsonl" "${both[@]}" "${invented[@]}" --from "$run-third"
train "$run-questions" starter-varied.toml "$continued" "${again[@]}" --from "$run-varied" --set steps=450
statements=(--set steps=290 --set learning_rate=8e-4 --set locality_weight=3.5 --set seed=1)
again+=("${both[@]}" "${zsre[@]}")
train "$run-statements" starter-varied.toml "$continued" "${again[@]}" --from "$run-questions" "${statements[@]}"

# Targets counted whole, and a locality loss that lets go of lost texts; then zsRE with other dates and names, too.
prepare varied.py varied-fresh.jsonl --data-dir "$data" --zsre-copies 6 --number-copies 24 --new-targets 0.7 --seed 2
prepare continuations.py invented-continued.jsonl --data "records:$cache/invented.jsonl"
whole=(--set learning_rate=8e-4 --set whole_target=true)
first=(--set steps=95 --set locality_weight=10 --set locality_scale=0.1 --set seed=2)
train "$run-whole" starter-varied.toml "$continued" "${again[@]}" --from "$run-statements" "${whole[@]}" "${first[@]}"
fresh=(--data "records:$cache/varied-fresh.jsonl" --data "records:$cache/invented-continued.jsonl" "${both[@]}" "${both[@]}" "${zsre[@]}")
last=(--set steps=360 --set locality_weight=16 --set locality_scale=0.3 --set seed=3)
train "$run" starter-varied.toml "$continued" "${fresh[@]}" --from "$run-whole" "${whole[@]}" "${last[@]}"
