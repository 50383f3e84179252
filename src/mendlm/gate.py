"""The gate that an edit passes: what the model answers before and under it, to its own prompts and to the user's guards.

A *guard* is a prompt whose answer must not get worse: a regression test. With an answer, it holds unless that answer was
given before and is given no more; without one, it holds if the answer stays as it was.

Knows a model, its formatter and edits; knows neither editor nor store.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mendlm.apply import Edit, side_by_side
from mendlm.errors import InputError, NumericalError
from mendlm.losses import token_nll
from mendlm.metrics import continues
from mendlm.tasks import EditExample
from mendlm.tasks.base import Fields, Probe, Task
from mendlm.text import Encoded, Formatter, by_length, scored_logits

OnFail = Literal["report", "refuse", "retry"]
Kind = Literal["prompt", "rephrasing", "unrelated", "guard"]


@dataclass(frozen=True)
class Guard:
    """A prompt whose answer must not get worse; `answer` is what it must be, or None for what it is before an edit."""

    prompt: str
    answer: str | None = None
    chat: bool = False


@dataclass(frozen=True)
class Asked:
    """One prompt with its answers before and under an edit."""

    kind: Kind
    prompt: str
    chat: bool
    wanted: str | None
    """The answer that it must get; None: the one it had."""
    before: str = ""
    after: str = ""
    probability: tuple[float, float] = (0.0, 0.0)
    """Of the wanted answer (or of the one before), the geometric mean over its tokens, before and after."""
    ok: bool = False
    was_ok: bool = True
    """Whether it was so before: a watched answer that was wrong already holds, and says nothing."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What is asked after every edit, and what happens to an edit that fails."""

    guards: tuple[Guard, ...] = ()
    on_fail: OnFail = "report"
    """`report` keeps the edit and says so; `refuse` raises `GateError`; `retry` tries `scales` before it does."""
    needed: float = 1.0
    """The share (0 to 1) of the rephrasings, of the unrelated prompts and of the guards that must hold, each by itself."""
    scales: tuple[float, ...] = (1.5, 0.7)
    """Strengths that `retry` tries, in this order, as multiples of the one asked for."""
    tokens: int = 8
    """How many tokens of an answer are looked at."""

    def __post_init__(self) -> None:
        if self.on_fail not in ("report", "refuse", "retry"):
            raise InputError(f"on_fail must be report, refuse or retry, got {self.on_fail!r}")
        if not 0 <= self.needed <= 1:
            raise InputError(f"needed is a share between 0 and 1, got {self.needed}")
        if self.tokens < 1:
            raise InputError(f"tokens must be at least 1, got {self.tokens}")

    def questions(self) -> list[Asked]:
        """The guards, to be asked."""
        return [Asked("guard", guard.prompt, guard.chat, guard.answer) for guard in self.guards]


@dataclass(frozen=True)
class Checks:
    """All that a gate saw of one edit, and its verdict."""

    asked: tuple[Asked, ...]
    passed: bool

    @property
    def kept(self) -> float | None:
        """The share that holds of the unrelated prompts and guards that were right before; None where there are none."""
        watched = [one.ok for one in self.asked if one.kind in ("unrelated", "guard") and one.was_ok]
        return sum(watched) / len(watched) if watched else None

    def to_json(self) -> dict[str, Any]:
        """As it is kept in a journal and sent by a service."""
        return {"passed": self.passed, "kept": self.kept, "asked": [asdict(one) for one in self.asked]}

    def failures(self) -> str:
        """What did not hold, in words, a line each."""
        lost = [one for one in self.asked if not one.ok]
        return "\n".join(f"  {one.kind} {one.prompt!r}: {one.before!r} became {one.after!r}" for one in lost)


def questions(example: EditExample, *, chat: bool) -> list[Asked]:
    """What a gate asks about a request: its prompt, rephrasings and unrelated prompts, all in its form."""
    return [
        Asked("prompt", example.prompt, chat, example.target),
        *(Asked("rephrasing", prompt, chat, example.target) for prompt in example.rephrasings),
        *(Asked("unrelated", probe.prompt, chat, probe.answer) for probe in example.unrelated),
    ]


@torch.no_grad()
def ask(
    model: Any, formatter: Formatter, asked: Sequence[Asked], before: Edit | None, after: Edit | None, tokens: int
) -> list[Asked]:
    """The questions with the model's answers under one edit and under another (None: the model as it runs now).

    Raises `InputError` for a prompt that cannot be used, before anything runs, and `NumericalError` where the probability of an
    answer is no number.
    """
    prompts = [formatter.encode(one.prompt, None, chat=one.chat) for one in asked]
    wanted = [formatter.encode(one.prompt, one.wanted, chat=one.chat) if one.wanted else None for one in asked]
    longest = max((len(text.target) + 1 for text in wanted if text), default=0)
    both = _Both(model, formatter, before, after)
    said = both.answers(prompts, max(tokens, longest))
    known = [text or Encoded(prompt.prompt, was) for text, prompt, was in zip(wanted, prompts, said[0], strict=True)]
    chances = both.probabilities(known)
    for one, *both_chances in zip(asked, *chances, strict=True):
        if not all(map(math.isfinite, both_chances)):
            raise NumericalError(
                f"the model answers {one.prompt[:60]!r} with NaN or infinity; make the edit at a smaller scale"
            )
    answered = []
    for place, one in enumerate(asked):
        was, now = (formatter.decode(answers[place]) for answers in said)
        was_ok = one.wanted is None or continues(was, one.wanted)
        if one.wanted is None:
            ok = said[0][place] == said[1][place]
        else:
            ok = continues(now, one.wanted) or (one.kind in ("unrelated", "guard") and not was_ok)
        chance = chances[0][place], chances[1][place]
        answered.append(replace(one, before=was, after=now, probability=chance, ok=ok, was_ok=was_ok))
    return answered


def judge(asked: Sequence[Asked], needed: float) -> Checks:
    """The verdict: the prompt itself holds, and of each other kind at least the needed share."""
    by_kind: dict[str, list[bool]] = {}
    for one in asked:
        by_kind.setdefault(one.kind, []).append(one.ok)
    shares = {kind: sum(held) / len(held) for kind, held in by_kind.items()}
    passed = all(share >= (1.0 if kind == "prompt" else needed) for kind, share in shares.items())
    return Checks(tuple(asked), passed)


class _Both:
    """A model under an edit and under another, side by side in one batch."""

    def __init__(self, model: Any, formatter: Formatter, before: Edit | None, after: Edit | None) -> None:
        self.model, self.formatter = model, formatter
        some = [edit for edit in (before, after) if edit is not None]
        self.edits = side_by_side(some) if some else None
        self.places = (-1 if before is None else 0, -1 if after is None else len(some) - 1)

    def _under(self, texts: int) -> contextlib.AbstractContextManager[None]:
        """Run so many texts under the one, and again under the other."""
        if self.edits is None:
            return contextlib.nullcontext()
        return self.edits.on(self.model, torch.tensor(self.places).repeat_interleave(texts))

    def answers(self, prompts: Sequence[Encoded], tokens: int) -> list[list[tuple[int, ...]]]:
        """Greedy answers of so many tokens to each prompt: before, and after."""
        found: list[list[tuple[int, ...]]] = [[()] * len(prompts) for _ in self.places]
        for group in by_length([len(text) for text in prompts], limit=16):
            with self._under(len(group)):
                said = self.formatter.generate(self.model, [prompts[i] for i in group] * 2, tokens)
            for place, answer in enumerate(said):
                found[place // len(group)][group[place % len(group)]] = answer
        return found

    def probabilities(self, texts: Sequence[Encoded]) -> list[list[float]]:
        """`p(target | prompt)` a token, the geometric mean, of each text before and after; 1 for a target without tokens."""
        found = [[1.0] * len(texts) for _ in self.places]
        some = [i for i, text in enumerate(texts) if text.target]
        for group in by_length([len(texts[i]) for i in some], limit=16):
            batch = self.formatter.batch([texts[some[i]] for i in group] * 2)
            with self._under(len(group)):
                logits = scored_logits(self.model, batch)
            totals = token_nll(logits, batch.label, batch.row, batch.size, whole=True)
            for place, total in enumerate(totals.tolist()):
                index = some[group[place % len(group)]]
                found[place // len(group)][index] = math.exp(-total / len(texts[index].target))
        return found


class _Guards(Task):
    """A file of guards: JSON Lines of `prompt`, and perhaps `answer` and `chat`."""

    name = "guards"

    def parse(self, fields: Fields) -> Probe:
        """One guard. An unknown field is refused, since it would be silently ignored."""
        unknown = sorted(set(fields.record) - {"prompt", "answer", "chat"})
        if unknown:
            raise fields.error(unknown[0], "is unknown; the fields are prompt, answer and chat")
        chat = fields.record.get("chat", False)
        if not isinstance(chat, bool):
            raise fields.error("chat", f"expected true or false, got {chat!r}")
        return Probe(fields.text("prompt"), fields.optional("answer"), "chat" if chat else None)


def load_guards(path: str | Path) -> tuple[Guard, ...]:
    """Read a file of guards: JSON Lines of `{"prompt": ..., "answer"?: ..., "chat"?: true}`. Raises `RecordError`."""
    return tuple(Guard(probe.prompt, probe.answer, probe.kind == "chat") for probe in _Guards().load(path).probes)
