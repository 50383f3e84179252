"""One editor on one model, dense and quantised: how well the same edits take, and the bytes of the model.

    python benchmarks/quantised.py --data-dir DIR [--limit 200] [--kinds dense,int8,nf4,torchao-int8]

DIR holds counterfact-dev.json. The editor is the one that was trained on the dense model; success, generality and locality are
those of `mendlm eval`, free generation among them. Each is given with its 95 % interval.
"""

from __future__ import annotations

import logging
from typing import Any

import bench
import mendlm
from mendlm.layers import size
from mendlm.models import QUANTIZATIONS
from mendlm.tasks import load_edits

DENSE = "dense"
SCORES = ("success", "generality", "locality", "success_generated", "generality_generated")
KEPT = (*SCORES, "locality_by_kind", "perplexity", "drawdown_ppl", "unrelated_kl", "already_given", "edit_ms")


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--editor", default="starter", help="a run folder whose editor was trained on the dense model")
    parser.add_argument("--limit", type=int, default=200, help="edits, the first ones of the file")
    parser.add_argument("--kinds", default=f"{DENSE},int8,nf4", help=f"of {DENSE}, {', '.join(QUANTIZATIONS)}")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("give --data-dir, the folder of counterfact-dev.json")
    data = load_edits(f"counterfact:{arguments.data_dir / 'counterfact-dev.json'}").limited(arguments.limit)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes the casts of every int8 layer and pass
    found: dict[str, Any] = {}
    for kind in arguments.kinds.split(","):
        model, tokenizer = mendlm.load(
            arguments.model, device=arguments.device, dtype=arguments.dtype, quantize=None if kind == DENSE else kind
        )
        method = mendlm.Editor.load(arguments.editor, model, tokenizer).method
        parameters, taken = size(model)
        summary = mendlm.evaluate(
            method, method.specs, model, tokenizer, data, mendlm.EvaluationConfig(), callback=progress(kind)
        ).summary
        found[kind] = {
            "quantization": summary["quantization"],
            "dtype": summary["dtype"],
            "model_sha256": summary["model_sha256"],
            "parameters": parameters,
            "bytes": taken,
            **{name: summary[name] for name in KEPT},
        }
    result = {"data": data.name, "data_sha256": data.sha256, "count": len(data.examples), "kinds": found}
    bench.save(arguments, "quantised", model.device, result)
    print("\n| weights | MB | " + " | ".join(SCORES) + " | edit, ms (p50) |")
    print("|---" * (len(SCORES) + 3) + "|")
    for kind, row in found.items():
        scores = [f"{row[name]['after']:.3f} ({row[name]['low']:.3f} to {row[name]['high']:.3f})" for name in SCORES]
        print("|", " | ".join([kind, f"{row['bytes'] / 2**20:.0f}", *scores, f"{row['edit_ms']['p50']:.0f}"]), "|")


def progress(kind: str) -> Any:
    """A line every hundred edits."""
    return lambda done, total: print(f"{kind}: {done}/{total}", flush=True) if done % 100 == 0 or done == total else None


if __name__ == "__main__":
    main()
