"""Put a trained editor into the package as the starter editor.

python scripts/ship_editor.py RUN SUMMARY.json [SUMMARY.json ...]

Writes src/mendlm/starter/editor.safetensors: parameters in bf16, statistics as they are, and in the metadata what the run
says about itself and the measured quality, as `mendlm eval` of the *shipped* file or of the run gave it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mendlm.checkpoint import load_editor, save_editor
from mendlm.editor import editor_file
from mendlm.files import read_json, sha256

KEPT = ("count", "chat", "success", "generality", "locality", "success_generated", "generality_generated", "drawdown_ppl")
TARGET = Path(__file__).parent.parent / "src" / "mendlm" / "starter" / "editor.safetensors"


def main(run: str, *summaries: str) -> None:
    """Write the shipped file."""
    method, about = load_editor(editor_file(run))
    quality: dict[str, Any] = {}
    for summary in map(Path, summaries):
        content = read_json(summary)
        name = content["data"].partition(":")[2] + (", chat" if content["chat"] else "")
        quality[name] = {key: content[key] for key in KEPT} | {"data_sha256": content["data_sha256"]}
    save_editor(TARGET, method, {**about, "quality": quality}, dtype=torch.bfloat16)
    print(f"{TARGET.name}: {TARGET.stat().st_size:,} bytes, sha256 {sha256(TARGET)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
