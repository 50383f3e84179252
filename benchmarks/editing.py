"""The latency of one edit over its floor, of many edits at once over one by one, and of texts under two edits of many requests.

    python benchmarks/editing.py [--model starter] [--editor starter] [--requests 256,1000]

The floor of an edit is one forward pass of the same tokens, logits at the target only, and one backward pass down to the
lowest edited layer. Bars: one edit at most 1.5 times its floor; 256 edits at once at least 2 times as fast
an edit, 1,000 at least 2.5 times. An edit is timed as it is made, and as it is finished: seen to have taken, or refined.
Of 32 texts, each half runs under one edit of its 16 requests: once by the rows of both, once by a copy of them for every text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import bench
import mendlm
from mendlm import apply
from mendlm.losses import token_nll
from mendlm.recording import record
from mendlm.text import scored_logits


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument(
        "--editor", default="starter", help="a run folder; 'none' for an untrained editor of the default layers"
    )
    parser.add_argument("--requests", type=bench.numbers, default="256,1000", help="edits at once")
    arguments = parser.parse_args()
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    editor = bench.editor_of(arguments.editor, model, tokenizer)
    many = [(e.prompt, e.target) for e in bench.requests(arguments.data_dir, max(arguments.requests))]
    one, few, half = many[0], apply.FEW, min(16, len(many) // 2)
    batch = editor.formatter.batch([editor.formatter.encode(*one)])
    texts = editor.formatter.batch([editor.formatter.encode(*request) for request in many[: 2 * half]])
    with torch.no_grad():
        halves = editor.method.combine(editor.method.parts(model, texts), half)
    assert editor.base  # the base's identity is hashed once a process, not once an edit

    def floor() -> None:
        lowest = editor.method.specs[:1]
        with record(model, lowest) as recording:
            loss = token_nll(scored_logits(model, batch), batch.label, batch.row, batch.size).sum()
        recording.gradient(loss)

    def forward() -> None:
        with torch.no_grad():
            scored_logits(model, batch)

    def two_edits(up_to: int) -> None:
        apply.FEW = up_to
        with torch.no_grad(), halves.on(model, torch.arange(2 * half, device=model.device) // half):
            scored_logits(model, texts)

    def at_once_and_alone(some: list[tuple[str, str]]) -> dict[str, Callable[[], object]]:
        return {"edit_many": lambda: editor.edit_many(some), "one_by_one": lambda: [editor.edit(*request) for request in some]}

    def edit(refine: int) -> None:
        editor.method.config = replace(editor.method.config, refine=refine)
        editor.edit(*one)

    steps = editor.method.refine
    sides = {"edit": lambda: edit(0), "finished": lambda: edit(steps), "floor": floor, "forward": forward}
    single = bench.interleaved(sides, arguments.rounds * 6)
    batched = {
        count: bench.interleaved(at_once_and_alone(many[:count]), max(1, arguments.rounds // 2)) for count in arguments.requests
    }
    routed = bench.interleaved({"copied": lambda: two_edits(0), "few": lambda: two_edits(few)}, arguments.rounds)
    result = {
        "edit_over_floor": single["edit"] / single["floor"],
        "edit_over_floor_bar": 1.5,
        "finished_over_floor": single["finished"] / single["floor"],
        "one_by_one_over_edit_many": {count: side["one_by_one"] / side["edit_many"] for count, side in batched.items()},
        "one_by_one_over_edit_many_bar": {256: 2.0, 1000: 2.5},
        "rows_copied_over_few_edits": routed["copied"] / routed["few"],
        "edit_ms": 1000 * single["edit"],
        "finished_ms": 1000 * single["finished"],
        "refine": steps,
        "floor_ms": 1000 * single["floor"],
        "forward_ms": 1000 * single["forward"],
        "edits_per_second": {count: count / side["edit_many"] for count, side in batched.items()},
        "layers": len(editor.method.specs),
        "dtype": str(model.dtype),
    }
    bench.save(arguments, "editing", model.device, result)


if __name__ == "__main__":
    main()
