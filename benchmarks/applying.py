"""What an edit costs where it is used: generation under one edit, and of 32 texts each under its own, over none.

    python benchmarks/applying.py [--model starter]

Bars: at most 5 % of the time of a generation under one edit, batches of 1 and of 8; at most 25 % with 32 edits over 32 texts.
The edit has as many rows as one of the shipped editor: a row a token of its request.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

import bench
import mendlm
from mendlm.text import Formatter

TOKENS = 32


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="new tokens a text")
    arguments = parser.parse_args()
    model, tokenizer = mendlm.load(arguments.model, device=arguments.device, dtype=arguments.dtype)
    formatter = Formatter.of(model, tokenizer)
    method, _ = bench.editor_for(model, bench.SHIPPED if arguments.model == "starter" else None)
    some = bench.requests(arguments.data_dir, 32)
    with torch.no_grad():
        edits = method.edits(model, formatter.batch([formatter.encode(e.prompt, e.target) for e in some])) * 1e-3
    one, prompts = edits[:1].unbind()[0], [formatter.encode(e.prompt, None) for e in some]

    def generate(size: int, edit: Any) -> Any:
        def action() -> None:
            with edit.on(model) if edit is not None else contextlib.nullcontext():
                formatter.generate(model, prompts[:size], arguments.tokens)

        return action

    sides = {f"{kind} {n}": generate(n, edit) for n in (1, 8) for kind, edit in (("none", None), ("one", one))}
    sides |= {"none 32": generate(32, None), "own 32": generate(32, edits)}
    seconds = bench.interleaved(sides, arguments.rounds)
    result = {
        "one_edit_overhead": {str(n): seconds[f"one {n}"] / seconds[f"none {n}"] - 1 for n in (1, 8)},
        "own_edits_overhead": seconds["own 32"] / seconds["none 32"] - 1,
        "tokens_per_second": {name: int(name.split()[1]) * arguments.tokens / s for name, s in seconds.items()},
        "rows": one.rows,
        "layers": len(method.specs),
        "dtype": str(model.dtype),
    }
    bench.save(arguments, "applying", model.device, result)


if __name__ == "__main__":
    main()
