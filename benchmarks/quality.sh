#!/usr/bin/env bash
# The starter editor's quality, as docs/results.md shows it:  benchmarks/quality.sh DATA_DIR OUT_DIR [EDITOR]
# DATA_DIR holds the files that benchmarks/prepare/data.py checks. A result that exists is kept, so that it can be interrupted.
set -euo pipefail
data=$1 out=$2 editor=(${3:+--editor "$3"})

score() { # NAME TASK:FILE options...
    local name=$1 source=${2/:/:$data/}
    shift 2
    [ -f "$out/$name/summary.json" ] && return
    mendlm eval --model starter --data "$source" --locality "text:$data/wikitext-2-b.txt" --out "$out/$name" "$@"
}

score counterfact counterfact:counterfact-dev.json --set generate=false "${editor[@]}"
score counterfact-first counterfact:counterfact-dev.json --limit 300 "${editor[@]}"
score counterfact-chat counterfact:counterfact-dev.json --chat --limit 100 "${editor[@]}"
score zsre zsre:zsre-dev.json "${editor[@]}"
score zsre-chat zsre:zsre-dev.json --chat --limit 100 "${editor[@]}"
# Fine-tuning: score rates on training requests; then give the better one as FT_RATE. Its first 200 dev requests are scored.
for rate in 1e-5 3e-5 1e-4 3e-4; do
    score "tune-ft-$rate" counterfact:counterfact-train.json --method ft --set "rate=$rate" --set generate=false --limit 40
done
rate=${FT_RATE:?look at tune-ft-* in $out and set FT_RATE}
score "counterfact-ft-$rate" counterfact:counterfact-dev.json --method ft --set "rate=$rate" --limit 200
score "zsre-ft-$rate" zsre:zsre-dev.json --method ft --set "rate=$rate"
