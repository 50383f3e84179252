"""Edits per second of the training step, against an oracle in the shape of the published code, and where the time goes.

    python benchmarks/training.py [--model starter | --shape 1b] [--batch 64] [--oracle-edits 4]

Same model, same requests, same run; the oracle is `oracle.py`, in float32. Bar: at least 15 times, last three blocks.
`equal_dtype` gives the oracle the step's own dtype. Also measured for the shipped editor's blocks, and with the trunk's
outputs cached. With `--shape` a decoder of random weights, and texts as in `scale.py`; bar of the 1B shape on a GPU: at least
100 times.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch

import bench
import oracle
import scale
from mendlm.replay import Trunk
from mendlm.text import Batch, Formatter, by_length
from mendlm.training import Drawn, TrainConfig, outer_loss
from mendlm.trunk_cache import TrunkCache

CONFIG = TrainConfig(edit_weight=1.0, own_locality=1.0)


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--oracle-edits", type=int, default=4, help="requests that the oracle runs in a round")
    parser.add_argument("--shape", choices=scale.SHAPES, help="a decoder of random weights instead of a model")
    arguments = parser.parse_args()
    model, formatter, drawn = scale.asked(arguments, CONFIG)
    single = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    blocks = model.config.num_hidden_layers
    result: dict[str, Any] = {"dtype": str(model.dtype), "batch": len(drawn), "bar": 100 if arguments.shape else 15}
    choices = {f"last 3 of {blocks} blocks": range(max(0, blocks - 3), blocks)}
    if arguments.model == "starter" and not arguments.shape:
        choices["shipped blocks"] = bench.SHIPPED
    for name, chosen in choices.items():
        result[name] = measure(arguments, model, single, formatter, drawn, chosen)
    bench.save(arguments, f"training-{arguments.shape}" if arguments.shape else "training", model.device, result)


def measure(arguments: Any, model: Any, single: Any, formatter: Formatter, drawn: list[Drawn], blocks: Any) -> dict[str, Any]:
    """Ratios and shares for one choice of blocks."""
    method, specs = bench.editor_for(model, blocks)
    trunk = Trunk.below(model, specs)
    method.fit_normalizer(method.gradient(model, formatter.batch([d.edit for d in drawn])))
    by_size = sorted(drawn, key=lambda d: len(d.edit) + len(d.rephrasing) + len(d.unrelated or ()))
    some = by_size[:: -(-len(drawn) // arguments.oracle_edits)]  # short and long ones as they come in the batch

    def step(below: Trunk | TrunkCache) -> None:
        loss, _ = outer_loss(method, model, formatter, below, drawn, CONFIG)
        (loss / len(drawn)).backward()
        method.zero_grad()

    def in_turn(base: Any) -> None:
        for one in some:
            (oracle.outer_loss(method, base, one, CONFIG) / len(some)).backward()
        method.zero_grad()

    loss, _ = outer_loss(method, model, formatter, trunk, some, CONFIG)
    expected = sum(oracle.outer_loss(method, single, one, CONFIG).item() for one in some)
    assert abs(loss.item() - expected) <= (1e-3 if model.dtype == torch.float32 else 0.1) * abs(expected), (loss, expected)
    with tempfile.TemporaryDirectory() as folder:
        cache = TrunkCache(trunk, model, folder)
        sides = {"step": lambda: step(trunk), "cached": lambda: step(cache), "oracle": lambda: in_turn(single)}
        if single is not model:
            sides["oracle_same_dtype"] = lambda: in_turn(model)
        seconds = bench.interleaved(sides, arguments.rounds)
    per_edit = {name: s / (len(some) if name.startswith("oracle") else len(drawn)) for name, s in seconds.items()}
    return {
        "ratio": per_edit["oracle"] / per_edit["step"],
        "ratio_at_equal_dtype": per_edit.get("oracle_same_dtype", per_edit["oracle"]) / per_edit["step"],
        "ratio_with_trunk_cache": per_edit["oracle"] / per_edit["cached"],
        "step_over_cached": per_edit["step"] / per_edit["cached"],
        "edits_per_second": 1 / per_edit["step"],
        "ms_per_edit": {name: 1000 * s for name, s in per_edit.items()},
        "time_shares": shares(model, method, formatter, trunk, drawn),
    }


def shares(model: Any, method: Any, formatter: Formatter, trunk: Trunk, drawn: list[Drawn]) -> dict[str, float]:
    """The step's time in trunk, top blocks, head, and editor, backward passes included.

    Trunk, editor and head are timed by themselves on the step's own inputs; the top blocks are the rest.
    """
    batches: list[tuple[str, Batch]] = []
    for kind in ("edit", "rephrasing", "unrelated"):
        texts = [text for d in drawn if (text := getattr(d, kind)) is not None]
        batches += [(kind, formatter.batch([texts[i] for i in group])) for group in by_length([len(text) for text in texts])]
    gradients = [method.gradient(model, batch) for kind, batch in batches if kind == "edit"]
    head = model.get_output_embeddings()

    def run_trunk() -> None:
        for _, batch in batches:
            trunk.run(model, batch.inputs)

    def run_editor() -> None:
        for gradient in gradients:
            edit = method.transform(gradient)
            sum(rows.delta.sum() + rows.u.sum() for rows in edit.updates.values()).backward()
        method.zero_grad()

    def run_head() -> None:
        for kind, batch in batches:
            forwards, backwards = {"edit": (2, 2), "rephrasing": (1, 1), "unrelated": (2, 1)}[kind]
            states = torch.zeros(len(batch.row), head.weight.shape[1], dtype=model.dtype, device=model.device)
            for number in range(forwards):
                logits = head(states.clone().requires_grad_(number < backwards)).float()
                if number < backwards:
                    logits.log_softmax(-1)[:, 0].sum().backward()

    def whole() -> None:
        loss, _ = outer_loss(method, model, formatter, trunk, drawn, CONFIG)
        loss.backward()
        method.zero_grad()

    parts = {"trunk": run_trunk, "editor": run_editor, "head": run_head}
    seconds = bench.interleaved({**parts, "whole": whole}, 3)
    found = {name: seconds[name] / seconds["whole"] for name in parts}
    return {**found, "top and the rest": 1 - sum(found.values())}


if __name__ == "__main__":
    main()
