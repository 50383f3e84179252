#!/usr/bin/env bash
# The starter editor's quality, as docs/results.md shows it:  benchmarks/quality.sh DATA_DIR OUT_DIR [EDITOR]
# DATA_DIR holds the files that docs/results.md names by sha256.
set -euo pipefail
data=$1 out=$2 editor=(${3:+--editor "$3"})
common=(--model starter --locality "text:$data/wikitext-2-b.txt" --force)

mendlm eval "${common[@]}" "${editor[@]}" --data "counterfact:$data/counterfact-dev.json" --out "$out/counterfact"
mendlm eval "${common[@]}" "${editor[@]}" --data "zsre:$data/zsre-dev.json" --out "$out/zsre"
mendlm eval "${common[@]}" "${editor[@]}" --data "counterfact:$data/counterfact-dev.json" --chat --limit 200 \
    --out "$out/counterfact-chat"
mendlm eval "${common[@]}" --method ft --set rate=1e-4 --data "counterfact:$data/counterfact-dev.json" --limit 100 \
    --out "$out/counterfact-ft"
