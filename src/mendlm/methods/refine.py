"""Refinement: where an edit has not taken, a few steps of fine-tuning on its own rows.

A trained editor's edit is one guess. Where a token of the target is not the likeliest one yet, it is close: of each row the
input `u`, which says where the change acts, stays, and `delta` is moved by Adam, in units of its own size, until the target is
given. Edits that have taken cost one pass, which sees it.

Knows edits and texts; knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mendlm.apply import Edit
from mendlm.losses import all_by_row, token_nll
from mendlm.lowrank import LowRank
from mendlm.replay import Tape, Trunk
from mendlm.text import Batch, Encoded, Formatter, by_length, scored_logits, short_attention, tensor_on

RATE = 0.03
"""Adam's rate, in units of the root mean square of a layer's `delta`."""
ENOUGH = 0.1
"""An edit is left alone where every token of its targets is the likeliest and the mean NLL of each target at most this."""

Pass = tuple[list[int], Batch, Tape]
"""Texts by number, together, and what the trunk makes of them."""


def passed(model: Any, formatter: Formatter, texts: Sequence[Encoded], places: list[int], trunk: Trunk) -> Pass:
    """Some of the texts, with their trunk run."""
    batch = formatter.batch([texts[place] for place in places])
    return places, batch, trunk.run(model, batch.inputs)


@torch.enable_grad()
def refined(
    model: Any, formatter: Formatter, edits: Edit, texts: Sequence[Encoded], steps: int, trunk: Trunk, passes: Sequence[Pass]
) -> Edit:
    """A batch of edits, one for each `len(texts) / len(edits)` consecutive texts, after at most `steps` steps of each.

    `passes` hold all texts as they were recorded; the first look replays their trunk. With 0 steps nothing changes. An edit
    that is still not taken after the last step stays as it is then. Raises `NumericalError` for edits that are not finite.
    """
    if not steps:
        return edits
    edits, size, most = edits.detach().require_finite(), len(texts) // len(edits), max(len(places) for places, _, _ in passes)
    now, missed = edits, set(range(len(edits)))
    for look in range(steps + 1):  # the first without a graph, since most edits have taken
        deltas = {name: update.delta.requires_grad_(look > 0) for name, update in now.updates.items()}
        lacking: set[int] = set()
        for places, batch, tape in passes:
            routing = tensor_on(formatter.device, [place // size for place in places])
            with trunk.replay(tape), now.on(model, routing), short_attention(model, batch):
                logits = scored_logits(model, batch)
            nll, taken = looked_at(logits, batch)
            some = {place // size for place, well in zip(places, taken.tolist(), strict=True) if not well}
            if look and some:
                torch.autograd.backward(nll[~taken].sum(), inputs=list(deltas.values()))
            lacking |= some
        if not lacking:
            break
        if not look:
            moves = Moves(edits)
        else:
            done = torch.tensor([edit not in lacking for edit in range(len(edits))], device=formatter.device)
            step_others(moves.optimizer, list(moves.shifts.values()), [delta.grad for delta in deltas.values()], done)
            now = moves.edit()
        if lacking != missed and look < steps:
            missed = lacking
            asked = [place for place in range(len(texts)) if place // size in missed]
            groups = by_length([len(texts[place]) for place in asked], limit=most)
            passes = [passed(model, formatter, texts, [asked[i] for i in group], trunk) for group in groups]
    return now.detach()


@torch.no_grad()
def step_others(
    optimizer: torch.optim.Optimizer, changes: Sequence[Tensor], slopes: Sequence[Tensor | None], done: Bool[Tensor, "batch"]
) -> None:
    """One step of the changes (batch, ...) down these slopes; those of edits that are done stay where they are."""
    held = [change[done] for change in changes]
    for change, slope in zip(changes, slopes, strict=True):
        change.grad = slope
    optimizer.step()
    for change, kept in zip(changes, held, strict=True):
        change[done] = kept


class Moves:
    """How far each `delta` of an edit, or of a batch of them, has moved, by Adam, in units of its own size."""

    def __init__(self, start: Edit) -> None:
        self.start = start
        self.shifts = {name: torch.zeros_like(update.delta) for name, update in start.updates.items()}
        self.optimizer = torch.optim.Adam(self.shifts.values(), lr=RATE, betas=(0.9, 0.99))
        self._sizes = {name: _size(update) for name, update in start.updates.items()}

    def edit(self) -> Edit:
        """The edit as it is now."""
        rows = self.start.updates.items()
        return replace(
            self.start,
            updates={name: LowRank(u.u, u.delta + self._sizes[name] * self.shifts[name]) for name, u in rows},
        )


def _size(update: LowRank) -> Tensor:
    """The root mean square of `delta` over the rows that count, (*batch, 1, 1)."""
    rows = update.nonzero().sum(-1).clamp(min=1) * update.delta.shape[-1]
    return (update.delta.square().sum((-2, -1)) / rows).sqrt()[..., None, None]


def looked_at(logits: Float[Tensor, "scored vocab"], batch: Batch) -> tuple[Float[Tensor, "size"], Bool[Tensor, "size"]]:
    """The mean NLL of each text's target, and whether it has taken."""
    nll = token_nll(logits, batch.label, batch.row, batch.size)
    return nll, all_by_row(logits.argmax(-1) == batch.label, batch.row, batch.size) & (nll <= ENOUGH)
