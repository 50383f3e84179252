"""Put a trained editor into the package as one of the starter model's.

python scripts/ship_editor.py starter|starter-many RUN STRENGTH [SUMMARY.json ...]

Writes its file in src/mendlm/starter: parameters in bf16, the learned rates multiplied by STRENGTH, statistics as they are, and
in the metadata what the run says about itself and the measured quality, as `mendlm eval` of the *shipped* file gave it.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from mendlm.checkpoint import load_editor, save_editor
from mendlm.editor import SHIPPED, editor_file
from mendlm.files import read_json, sha256

KEPT = (
    "count",
    "num_edits",
    "chat",
    "success",
    "generality",
    "locality",
    "success_generated",
    "generality_generated",
    "drawdown_ppl",
)
FOLDER = Path(__file__).parent.parent / "src" / "mendlm" / "starter"


def main(name: str, run: str, strength: str, *summaries: str) -> None:
    """Write the shipped file."""
    target = FOLDER / SHIPPED[name]
    method, about = load_editor(editor_file(run))
    with torch.no_grad():
        for rate in method.rates():
            rate += math.log(float(strength))
    quality: dict[str, Any] = {}
    for summary in map(Path, summaries):
        content = read_json(summary)
        together = f", {content['num_edits']} at once" if content["num_edits"] > 1 else ""
        what = content["data"].partition(":")[2] + (", chat" if content["chat"] else "") + together
        quality[what] = {key: content[key] for key in KEPT} | {"data_sha256": content["data_sha256"]}
    save_editor(target, method, {**about, "strength": float(strength), "quality": quality}, dtype=torch.bfloat16)
    print(f"{target.name}: {target.stat().st_size:,} bytes, sha256 {sha256(target)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
