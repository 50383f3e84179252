#!/usr/bin/env bash
# The short runs behind the starter editor's recipe:  recipes/sweeps.sh DATA_DIR OUT TRUNK_CACHE_DIR
# Each folder in OUT holds numbers, a table and a picture. Interrupted, the same command goes on.
set -euo pipefail
here=$(dirname "$0") data=$1 out=$2 cache=$3
sweep() {
    mendlm sweep "$@" --out "$out/$1" --config "$here/starter.toml" --steps 24 \
        --data "counterfact:$data/counterfact-train.json" \
        --set own_locality=1.0 --set chat_share=0.0 --set batch_size=32 --set normalizer_examples=256
}
sweep blocks 13-15 16-18 19-21 22-24 27-29
for one in "locality_weight 0.3 1.0 3.0 10.0" "editor.rank 32 128 512" "learning_rate 3e-4 1.5e-3 3e-3"; do
    sweep $one --trunk-cache "$cache"  # the same texts through the same blocks
done
