"""The arithmetic floor of a training step and of an edit, and what is measured over it.

    python benchmarks/floor.py [--model starter | --shape 1b] [--data-dir DIR] [--batch 64]

The floor is the operations that nothing can leave out, at the rate of the machine's own matrix products, each part in its
dtype and shapes: the trunk once a text; the blocks above it forward and back, at the edit twice and at an unrelated text twice
forward; the head at scored positions; the editor forward, again, and back; the overlay. Also the speed-up that a trunk cache
has by it, and the one measured. Bars: 0.8 of the floor, and 0.8 of the derived speed-up. With `--shape` a model of random
weights and texts of the lengths of `mendlm.plan.Lengths`, as in `scale.py`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.nn import functional as F

import bench
import scale
from mendlm.layers import block_of, block_stacks
from mendlm.methods.network import training_precision
from mendlm.replay import Trunk
from mendlm.training import Drawn, TrainConfig, outer_loss
from mendlm.trunk_cache import TrunkCache

CONFIG = TrainConfig(edit_weight=1.0, own_locality=1.0)
ROWS = 256
"""Rows of the matrix products that are timed: about the tokens of a pass."""


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--shape", choices=scale.SHAPES, help="a decoder of random weights instead of a model")
    arguments = parser.parse_args()
    model, formatter, drawn = scale.asked(arguments, CONFIG)
    shipped = arguments.model == "starter" and not arguments.shape
    method, specs = bench.editor_for(model, bench.SHIPPED if shipped else None)
    trunk = Trunk.below(model, specs)
    method.fit_normalizer(method.gradient(model, formatter.batch([d.edit for d in drawn])))
    one = formatter.batch([drawn[0].edit])

    def train(below: Trunk | TrunkCache) -> None:
        loss, _ = outer_loss(method, model, formatter, below, drawn, CONFIG)
        (loss / len(drawn)).backward()
        method.zero_grad()

    work = operations(model, method, drawn)
    with tempfile.TemporaryDirectory() as folder:
        cache = TrunkCache(trunk, model, folder)
        matrices = products(model, method)
        sides: dict[str, Any] = {"step": lambda: train(trunk), "cached": lambda: train(cache)}
        sides |= {name: action for name, (action, _) in matrices.items()}
        sides["edit"] = lambda: method.edit(model, one)
        seconds = bench.interleaved(sides, arguments.rounds)
    rates = {name: count / seconds[name] for name, (_, count) in matrices.items()}
    floors = {part: work[part] / rates["editor" if part in ("editor", "overlay") else part] for part in work}
    floor, above = sum(floors.values()), sum(s for part, s in floors.items() if part != "trunk")
    measured = seconds["step"] / len(drawn)
    result = {
        "dtype": str(model.dtype),
        "batch": len(drawn),
        "share_of_floor": floor / measured,
        "share_of_floor_bar": 0.8,
        "ms_per_edit": {"measured": 1000 * measured, "floor": 1000 * floor},
        "floor_ms_by_part": {part: 1000 * s for part, s in floors.items()},
        "giga_operations_per_edit": {part: count / 1e9 for part, count in work.items()},
        "giga_operations_per_second": {part: rate / 1e9 for part, rate in rates.items()},
        "cache_speed_up": seconds["step"] / seconds["cached"],
        "cache_speed_up_by_the_floor": floor / above,
        "cache_share_of_derived": (seconds["step"] / seconds["cached"]) / (floor / above),
        "single_edit_ms": 1000 * seconds["edit"],
    }
    bench.save(arguments, f"floor-{arguments.shape}" if arguments.shape else "floor", model.device, result)


def operations(model: Any, method: Any, drawn: list[Drawn]) -> dict[str, float]:
    """Operations of a training edit of a decoder, by part: two for each product of two numbers."""
    ((name, blocks),) = block_stacks(model).items()
    first = min(block_of(spec.name, [name])[1] for spec in method.specs)
    sizes = [sum(weight.numel() for weight in block.parameters() if weight.dim() == 2) for block in blocks]
    read = {kind: sum(_read(d, kind) for d in drawn) / len(drawn) for kind in ("edit", "rephrasing", "unrelated")}
    scored = {kind: sum(_scored(d, kind) for d in drawn) / len(drawn) for kind in read}
    passes = {"edit": 4, "rephrasing": 2, "unrelated": 3}  # forward and back, under the base and under the edit
    rank = method.config.rank
    widths = sum(sum(spec.shape) for spec in method.specs)
    rows = read["edit"]
    return {
        "trunk": 2.0 * sum(sizes[:first]) * sum(read.values()),
        "top": 2.0 * sum(sizes[first:]) * sum(passes[kind] * read[kind] for kind in read),
        "head": 2.0 * model.get_output_embeddings().weight.numel() * sum(passes[kind] * scored[kind] for kind in read),
        "editor": 2.0 * 4 * 4 * rank * widths * rows,
        "overlay": 2.0 * 3 * widths * rows * sum(read.values()),
    }


def _read(drawn: Drawn, kind: str) -> int:
    text = getattr(drawn, kind)
    return 0 if text is None else len(text.prompt) + max(0, len(text.target) - 1)


def _scored(drawn: Drawn, kind: str) -> int:
    text = getattr(drawn, kind)
    return 0 if text is None else max(1, len(text.target))


def products(model: Any, method: Any) -> dict[str, tuple[Any, float]]:
    """The matrix products that stand for each part, and their operations."""
    spec, head = method.specs[0], model.get_output_embeddings().weight
    weight, width = spec.weight(model.get_submodule(spec.name)).detach(), sum(spec.shape)
    x = torch.randn(ROWS, spec.d_in, dtype=model.dtype, device=model.device)
    states = torch.randn(ROWS, head.shape[1], dtype=model.dtype, device=model.device)
    editor = training_precision(model.dtype) or torch.float32
    z, v = (torch.randn(rows, width, dtype=editor, device=model.device) for rows in (ROWS, method.config.rank))

    def times(inputs: torch.Tensor, matrix: torch.Tensor, often: int) -> tuple[Any, float]:
        def action() -> None:
            with torch.no_grad():
                for _ in range(often):
                    F.linear(inputs, matrix)

        return action, 2.0 * often * inputs.numel() * matrix.shape[0]

    block = times(x, weight, 50)
    return {"trunk": block, "top": block, "head": times(states, head, 5), "editor": times(z, v, 20)}


if __name__ == "__main__":
    main()
