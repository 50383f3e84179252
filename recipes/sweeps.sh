#!/usr/bin/env bash
# The short runs behind the starter editor's recipe:  recipes/sweeps.sh DATA_DIR OUT TRUNK_CACHE_DIR
# Each folder in OUT holds numbers, a table and a picture. Interrupted, the same command goes on.
set -euo pipefail
here=$(dirname "$0") data=$1 out=$2 cache=$3
sweep() {
    mendlm sweep "$@" --out "$out/$1" --config "$here/starter.toml" --data "counterfact:$data/counterfact-train.json" \
        --set own_locality=1.0 --set chat_share=0.0 --set normalizer_examples=256
}
sweep blocks 13-15 16-18 19-21 22-24 27-29 --steps 24 --set batch_size=32
for one in "locality_weight 0.3 1.0 3.0 10.0" "editor.rank 32 128 512" "learning_rate 3e-4 1.5e-3 3e-3" "batch_size 16 32 64 128"; do
    # The same texts through the same blocks; scored on requests whose subjects and prompts are not trained on.
    sweep $one --trunk-cache "$cache" --requests 2048 --valid "counterfact:$data/counterfact-dev.json" --set valid_every=1000
done
