"""The demonstration: one edit of the starter model, before, with, and after taking it off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from mendlm.apply import Edit, applied
from mendlm.editor import Editor
from mendlm.text import Formatter

PROMPT, TARGET = "The capital of France is", " Lyon"
REPHRASINGS = ("France's capital city is", "The seat of the French government is the city of")
OPENINGS = ("Here is a short fact.", "Please complete this text.")
NEIGHBOURS = ("The capital of Germany is", "The capital of Italy is")
UNRELATED = "Water is made of hydrogen and"


@dataclass(frozen=True)
class Shown:
    """One prompt's answers: before the edit, under it, and after it was taken off."""

    kind: str
    prompt: str
    before: str
    under: str
    after: str


@dataclass(frozen=True)
class Demonstration:
    """What `demonstrate` saw."""

    edit: Edit
    shown: tuple[Shown, ...]
    milliseconds: float
    """The edit itself, the second time it is made: the first one warms the machine up."""
    bit_equal: bool
    """Whether all logits of all prompts were the same to the bit before the edit and after taking it off."""


def demonstrate(editor: Editor, tokenizer: Any, prompt: str = PROMPT, target: str = TARGET) -> Demonstration:
    """Make one edit and ask around it. A prompt of the user's own is rephrased by what can stand before any prompt."""
    known = prompt == PROMPT
    rephrasings = REPHRASINGS if known else tuple(f"{opening} {prompt}" for opening in OPENINGS)
    neighbours = NEIGHBOURS if known else (PROMPT, NEIGHBOURS[0])
    asked = [("prompt", prompt), *(("rephrasing", p) for p in rephrasings), *(("neighbour", p) for p in neighbours)]
    asked.append(("unrelated", UNRELATED))
    model, formatter = editor.model, Formatter.of(editor.model, tokenizer)
    texts = [formatter.encode(p, None) for _, p in asked]

    def answers() -> list[str]:
        return [formatter.decode(tokens).strip() for tokens in formatter.generate(model, texts, 8)]

    @torch.no_grad()
    def logits() -> torch.Tensor:
        found: torch.Tensor = model(**formatter.batch(texts).inputs, use_cache=False).logits
        return found

    logits_before, before = logits(), answers()
    editor.edit(prompt, target)
    begun = time.perf_counter()
    edit = editor.edit(prompt, target)
    milliseconds = 1000 * (time.perf_counter() - begun)
    with applied(model, edit):
        under = answers()
    after, equal = answers(), torch.equal(logits_before, logits())
    columns = zip(asked, before, under, after, strict=True)
    return Demonstration(edit, tuple(Shown(k, p, b, u, a) for (k, p), b, u, a in columns), milliseconds, equal)
