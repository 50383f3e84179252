"""One editor on one model, dense and quantised: how well the same edits take, and the bytes of the model.

    python benchmarks/quantised.py --data-dir DIR [--limit 200] [--kinds dense,int8,nf4,torchao-int8]

DIR holds counterfact-dev.json and zsre-dev.json; without it, requests are made up. The editor is the one trained on the
dense model; success, generality and locality are those of `mendlm eval`, free generation among them. Each is given with its
95 % interval. `run_all.py --tables` makes a table of them.
"""

from __future__ import annotations

import logging
from typing import Any

import bench
import mendlm
from mendlm.layers import size
from mendlm.models import QUANTIZATIONS
from mendlm.tasks import Dataset, load_edits

DENSE = "dense"
TASKS = ("counterfact", "zsre")
SCORES = ("success", "generality", "locality", "success_generated", "generality_generated")
KEPT = (*SCORES, "locality_by_kind", "perplexity", "drawdown_ppl", "unrelated_kl", "already_given", "edit_ms")


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--editor", default="starter", help="a run folder of the dense model; 'none' for an untrained editor")
    parser.add_argument("--limit", type=int, default=200, help="edits of each task, the first ones of its file")
    parser.add_argument("--kinds", default=f"{DENSE},int8,nf4", help=f"of {DENSE}, {', '.join(QUANTIZATIONS)}")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        made = tuple(bench.requests(None, arguments.limit))
        data = {"made up": Dataset(name="made up", sha256="", examples=made, probes=())}
    else:
        paths = {task: arguments.data_dir / f"{task}-dev.json" for task in TASKS}
        data = {task: load_edits(f"{task}:{path}").limited(arguments.limit) for task, path in paths.items()}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes the casts of every int8 layer and pass
    found: dict[str, Any] = {}
    for kind in arguments.kinds.split(","):
        model, tokenizer = mendlm.load(
            arguments.model, device=arguments.device, dtype=arguments.dtype, quantize=None if kind == DENSE else kind
        )
        method = bench.editor_of(arguments.editor, model, tokenizer).method
        parameters, taken = size(model)
        found[kind] = {"parameters": parameters, "bytes": taken}
        for task, requests in data.items():
            summary = mendlm.evaluate(
                method,
                method.specs,
                model,
                tokenizer,
                requests,
                mendlm.EvaluationConfig(),
                callback=progress(f"{kind}, {task}"),
            ).summary
            found[kind] |= {name: summary[name] for name in ("quantization", "dtype", "model_sha256")}
            found[kind][task] = {name: summary[name] for name in KEPT}
    described = {task: {"sha256": requests.sha256, "count": len(requests.examples)} for task, requests in data.items()}
    bench.save(arguments, "quantised", model.device, {"data": described, "kinds": found})


def progress(kind: str) -> Any:
    """A line every hundred edits."""
    return lambda done, total: print(f"{kind}: {done}/{total}", flush=True) if done % 100 == 0 or done == total else None


if __name__ == "__main__":
    main()
