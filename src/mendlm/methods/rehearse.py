"""Rehearsal: an edit that joins others is tuned on its own rows until what was promised holds with all of them together.

The edits of a stack act through the same few layers: each reaches the others' prompts, and several ruin text that none of them
touches alone. So the stack's prompts are asked again, and samples of the model itself are compared with what the model alone
makes of them (rehearsal and pseudo-rehearsal, Robins 1995). As in refining, of each row `u` stays and `delta` takes steps of
Adam in units of its own size. The other edits stay as they are, to the bit.

Knows edits and texts; knows no method.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mendlm.apply import CHANGED_BASE, Edit, stacked
from mendlm.errors import InputError
from mendlm.layers import editable
from mendlm.losses import all_by_row, token_kl
from mendlm.methods.refine import Moves, looked_at
from mendlm.replay import Tape, Trunk
from mendlm.text import Batch, Encoded, Formatter, by_length, sampling, scored_logits, short_attention

STEPS = 40
"""Steps at most, where nothing else is said."""
STAYS = 0.1
"""A distribution has stayed if its KL is at most this, in nats a token."""
WEIGHT = 3.0
"""The weight of the samples' mean KL beside the sum of what lacks."""
SAMPLES, LENGTH, SCORED, TURNS = 48, 20, 8, 3
"""The model's own texts: their number, their tokens, how many at the end of each are compared, and in how many turns."""
TOGETHER = 32
"""Texts a pass."""


@dataclass(frozen=True, eq=False)
class _Texts:
    """Texts of like length, what the trunk makes of them, and the logits to compare with, where they are to stay."""

    batch: Batch
    tape: Tape
    before: Tensor | None = None


class Rehearsal:
    """Rehearses edits of one model, which must run without them; it keeps the model's own samples."""

    def __init__(self, model: Any, formatter: Formatter) -> None:
        self.model, self.formatter = model, formatter
        self._own: tuple[frozenset[str], list[_Texts]] = frozenset(), []

    @functools.cached_property
    def samples(self) -> list[Encoded]:
        """Texts that the model itself makes, the same each time; none for models that continue no text."""
        tokenizer = self.formatter.tokenizer
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
        if self.formatter.family != "causal" or not starts:
            return []
        given = [Encoded((starts[i % len(starts)],), ()) for i in range(SAMPLES)]
        with sampling(self.model, torch.Generator().manual_seed(0)):
            drawn = self.formatter.generate(self.model, given, LENGTH)
        pairs = zip(given, drawn, strict=True)
        return [Encoded((*start.prompt, *text[:-SCORED]), text[-SCORED:]) for start, text in pairs if len(text) == LENGTH]

    @torch.enable_grad()
    def joined(
        self,
        edit: Edit,
        below: Edit | None,
        promised: Sequence[Encoded],
        earlier: Sequence[Encoded] = (),
        kept: Sequence[Encoded] = (),
        *,
        before: Edit | None = None,
        steps: int = STEPS,
    ) -> tuple[Edit, int]:
        """A single edit that joins `below`, after at most `steps` steps, and how many it took.

        Of each text that it promised every target token is to be the likeliest, and its mean NLL small, together with `below`
        and by itself; of each promised `earlier`, together. Of each kept text the distribution of the target is to be what it
        is under `before`, and where there are edits below, that of the model's own samples what it is under none. An edit
        under which all of it holds is looked at once and comes back as it is; one that holds a change of the base is left
        alone. Raises `NumericalError` for an edit that is not finite.
        """
        if steps <= 0 or CHANGED_BASE in edit.about:
            return edit, 0
        edit = edit.detach().require_finite()
        names = frozenset(name for one in (edit, below, before) if one is not None for name in one.updates)
        available = editable(self.model)
        known = [available[name] for name in sorted(names & available.keys())]
        trunk = Trunk.where_possible(self.model, known) if len(known) == len(names) else Trunk(())
        alone = [] if below is None else self._texts(promised, trunk)
        stacked_up = self._texts([*promised, *earlier], trunk) + self._texts(kept, trunk, before, stay=True)
        if below is not None and self._own[0] != names:
            turns = [self._texts(self.samples[turn::TURNS], trunk, stay=True) for turn in range(TURNS)]
            self._own = names, [texts for turn in turns for texts in turn]
        own = self._own[1] if below is not None else []
        now, moves = edit, Moves(edit)
        for look in range(steps + 1):
            deltas = [update.delta.requires_grad_() for update in now.updates.values()]
            stack = now if below is None else stacked([below, now])
            lacking = False
            for texts, under in [*((one, now) for one in alone), *((one, stack) for one in stacked_up)]:
                value, well = self._looked_at(texts, under, trunk)
                if not bool(well.all()):
                    lacking = True
                    torch.autograd.backward(value[~well].sum(), inputs=deltas)
            if own:
                value, _ = self._looked_at(own[look % len(own)], stack, trunk)
                lacking |= bool(value.mean() > STAYS)
                if lacking:
                    torch.autograd.backward(WEIGHT * value.mean(), inputs=deltas)
            if look == steps or not lacking:
                break
            for shift, delta in zip(moves.shifts.values(), deltas, strict=True):
                shift.grad = delta.grad
            moves.optimizer.step()
            now = moves.edit()
        return now.detach().require_finite(), look

    def _looked_at(self, texts: _Texts, edit: Edit, trunk: Trunk) -> tuple[Tensor, Tensor]:
        """What each text loses under the edit: NLL, or KL where it is to stay; and whether that is well."""
        batch = texts.batch
        with trunk.replay(texts.tape), edit.on(self.model), short_attention(self.model, batch):
            logits = scored_logits(self.model, batch)
        if texts.before is None:
            return looked_at(logits, batch)
        kl = token_kl(texts.before, logits, batch.row, batch.size)
        same = all_by_row(logits.argmax(-1) == texts.before.argmax(-1), batch.row, batch.size)
        return kl, (kl <= STAYS) & same

    @torch.no_grad()
    def _texts(self, texts: Sequence[Encoded], trunk: Trunk, edit: Edit | None = None, *, stay: bool = False) -> list[_Texts]:
        """Texts in groups of like length, with their trunk run; those that are to stay with their logits under an edit."""
        found = []
        for group in by_length([len(text) for text in texts], limit=TOGETHER):
            batch = self.formatter.batch([texts[i] for i in group])
            tape = trunk.run(self.model, batch.inputs)
            before = None
            if stay:
                under = contextlib.nullcontext() if edit is None else edit.on(self.model)
                with trunk.replay(tape), under, short_attention(self.model, batch):
                    before = scored_logits(self.model, batch)
            found.append(_Texts(batch, tape, before))
        return found


def require_steps(steps: int) -> None:
    """Raise `InputError` for a number of steps below 0."""
    if steps < 0:
        raise InputError(f"rehearse is a number of steps, 0 for none, got {steps}")
