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

from mendlm.apply import Edit
from mendlm.losses import all_by_row, token_nll
from mendlm.lowrank import LowRank
from mendlm.text import Encoded, Formatter, by_length, scored_logits, short_attention, tensor_on

RATE = 0.03
"""Adam's rate, in units of the root mean square of a layer's `delta`."""
ENOUGH = 0.1
"""An edit is left alone where every token of its targets is the likeliest and the mean NLL of each target at most this."""


@torch.enable_grad()
def refined(model: Any, formatter: Formatter, edits: Edit, texts: Sequence[Encoded], steps: int, limit: int) -> Edit:
    """A batch of edits, each for as many consecutive texts as it has share of them, after at most `steps` steps of each.

    Passes have at most `limit` texts. With 0 steps the edits come back as they are.
    """
    if not steps:
        return edits
    edits, size = edits.detach(), len(texts) // len(edits)
    sizes = {name: _size(update) for name, update in edits.updates.items()}
    shifts = {name: torch.zeros_like(update.delta) for name, update in edits.updates.items()}
    optimizer = torch.optim.Adam(shifts.values(), lr=RATE, betas=(0.9, 0.99))
    missed, now = list(range(len(edits))), edits
    for left in range(steps, -1, -1):
        deltas = {name: (u.delta + sizes[name] * shifts[name]).requires_grad_() for name, u in edits.updates.items()}
        now = replace(edits, updates={name: LowRank(u.u, deltas[name]) for name, u in edits.updates.items()})
        asked = [place for edit in missed for place in range(edit * size, (edit + 1) * size)]
        failed = set()
        for group in by_length([len(texts[place]) for place in asked], limit=limit):
            places = [asked[i] for i in group]
            batch = formatter.batch([texts[place] for place in places])
            routing = tensor_on(formatter.device, [place // size for place in places])
            with now.on(model, routing), short_attention(model, batch):
                logits = scored_logits(model, batch)
            nll = token_nll(logits, batch.label, batch.row, batch.size)
            taken = all_by_row(logits.argmax(-1) == batch.label, batch.row, batch.size) & (nll <= ENOUGH)
            failed |= {place // size for place, well in zip(places, taken.tolist(), strict=True) if not well}
            if left:
                torch.autograd.backward(nll.sum(), inputs=list(deltas.values()))
        missed = sorted(failed)
        if not missed or not left:
            break
        done = torch.tensor([edit not in failed for edit in range(len(edits))], device=formatter.device)
        held = [shift[done] for shift in shifts.values()]
        for name, shift in shifts.items():
            shift.grad = deltas[name].grad
        optimizer.step()
        for shift, kept in zip(shifts.values(), held, strict=True):
            shift[done] = kept
    return now.detach()


def _size(update: LowRank) -> torch.Tensor:
    """The root mean square of `delta` over the rows that count, (batch, 1, 1)."""
    rows = update.nonzero().sum(-1).clamp(min=1) * update.delta.shape[-1]
    return (update.delta.square().sum((-2, -1)) / rows).sqrt()[:, None, None]
