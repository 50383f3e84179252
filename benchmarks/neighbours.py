"""How far naming a neighbour carries: edits rehearsed to keep the answers of some neighbours, scored on another.

    python benchmarks/neighbours.py --data-dir DIR [--limit 100]

Of each request of counterfact-dev.json the neighbours of others with the same old answer are named, none, one or two of them,
as `mendlm store DIR add --unrelated` does. The request's own neighbour is named nowhere, and says what that carries to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

import bench
import mendlm
from mendlm.apply import side_by_side
from mendlm.evaluation import EvaluationConfig, Evaluator
from mendlm.methods.base import Learned
from mendlm.metrics import bootstrap
from mendlm.session import Session
from mendlm.tasks import EditExample

NAMED = (0, 1, 2)


def others(example: EditExample, examples: Sequence[EditExample]) -> list[str]:
    """The neighbours of other requests with the same old answer."""
    own = {example.prompt, *(probe.prompt for probe in example.unrelated)}
    found = [p.prompt for one in examples for p in one.unrelated if one.old == example.old and one.prompt != example.prompt]
    return [prompt for prompt in dict.fromkeys(found) if prompt not in own]


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--limit", type=int, default=100, help="requests that are scored")
    parser.add_argument("--editor", default="starter")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("--data-dir is needed: the folder with counterfact-dev.json")
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    editor = bench.editor_of(arguments.editor, model, tokenizer)
    session = Session(model, tokenizer, editor)
    config = EvaluationConfig(generate=False)
    assert isinstance(editor.method, Learned)
    evaluator = Evaluator(editor.method, editor.method.specs, model, tokenizer, config)
    examples = mendlm.load_edits(f"counterfact:{arguments.data_dir / 'counterfact-dev.json'}").examples
    some = [one for one in examples if len(others(one, examples)) >= max(NAMED)][: arguments.limit]
    found = []
    for named in NAMED:
        edits, seconds = [], []
        for one in some:
            begun = time.perf_counter()
            edits.append(session.preview(one.prompt, one.target, unrelated=others(one, examples)[:named], on_base=True).edit)
            seconds.append(time.perf_counter() - begun)
        asked = {
            "success": [(i, evaluator.encode(one, one.prompt)) for i, one in enumerate(some)],
            "generality": [(i, evaluator.encode(one, prompt)) for i, one in enumerate(some) for prompt in one.rephrasings],
            "locality": [(i, text) for i, one in enumerate(some) for text in evaluator.probe(one.unrelated)],
        }
        row: dict[str, object] = {"named": named, "edits": len(some), "seconds": statistics.median(seconds)}
        row["rehearsed"] = sum("rehearsed" in edit.about for edit in edits) / len(edits)
        for name, texts in asked.items():
            scores = evaluator.score(texts, side_by_side(edits))
            held = [float(score.kept if name == "locality" else score.right[1]) for score in scores]
            row[name] = {"after": statistics.mean(held), "interval": bootstrap(held)}
        print(row, flush=True)
        found.append(row)
    bench.save(arguments, "neighbours", torch.device(model.device), {"rows": found})


if __name__ == "__main__":
    main()
