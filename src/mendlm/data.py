"""Making the edit set of the `wikitext` task: passages of raw text, each with a continuation sampled from a model.

The paper's targets are samples of a small model, which the base to be edited rarely gives greedily. Knows models and text;
`mendlm.tasks.wikitext` reads what is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mendlm.errors import InputError
from mendlm.losses import all_by_row
from mendlm.tasks import load
from mendlm.text import Encoded, Formatter, sampling, scored_logits


@dataclass(frozen=True)
class Samples:
    """Passages and, for each, the passage with its sampled continuation."""

    n_tokens: int
    original: list[str]
    completions: list[str]
    predicted: int
    """Passages dropped because the model's greedy continuation is the sample."""
    unfit: int
    """Passages dropped because the sample ends early, or is other tokens when its text is read back."""

    def released(self) -> dict[str, Any]:
        """The content of a file in the form that was released with the paper."""
        return {"n_tokens": self.n_tokens, "original": self.original, "completions": self.completions}


def passages(path: str | Path) -> list[str]:
    """The different passages of a raw text: as the `text` task cuts them, both halves together. Raises `RecordError`."""
    return list(dict.fromkeys(f"{probe.prompt} {probe.answer}" for probe in load(f"text:{path}").probes))


def sample(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    count: int,
    tokens: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    callback: Callable[[int, int], object] | None = None,
) -> Samples:
    """Sample `count` continuations of `tokens` tokens, one a passage, of passages in random order.

    Fewer if the passages run out. `callback` is told how many there are, of how many. Raises `InputError` if the model is
    not a causal one, or if no passage is left.
    """
    formatter = Formatter.of(model, tokenizer)
    if formatter.family != "causal":
        raise InputError(f"continuations are sampled from a causal model; this one is of the family '{formatter.family}'")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    original: list[str] = []
    completions: list[str] = []
    predicted = unfit = 0
    for start in range(0, len(order), batch_size):
        some = [texts[i] for i in order[start : start + batch_size]]
        prompts = [formatter.encode(text, None) for text in some]
        with sampling(model, generator):
            drawn = formatter.generate(model, prompts, tokens)
        fit = [
            (text, whole, Encoded(prompt.prompt, found))
            for text, prompt, found in zip(some, prompts, drawn, strict=True)
            if len(found) == tokens and (whole := _as_text(formatter, text, prompt, found)) is not None
        ]
        unfit += len(some) - len(fit)
        given = _greedy(model, formatter, [encoded for *_, encoded in fit])
        predicted += sum(given)
        new = [(text, whole) for (text, whole, _), same in zip(fit, given, strict=True) if not same][: count - len(original)]
        original += [text for text, _ in new]
        completions += [whole for _, whole in new]
        if callback is not None:
            callback(len(original), count)
        if len(original) == count:
            break
    if not original:
        raise InputError(f"none of {len(texts)} passages is left ({predicted} predicted, {unfit} unfit); give more text")
    return Samples(tokens, original, completions, predicted, unfit)


def _as_text(formatter: Formatter, passage: str, prompt: Encoded, found: tuple[int, ...]) -> str | None:
    """The passage with its continuation; None if the continuation's text is encoded as other tokens."""
    ids = [*prompt.prompt, *found]
    whole = str(formatter.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    rest = whole[len(passage) :]
    if not whole.startswith(passage) or not rest.strip() or formatter.encode(passage, rest).target != found:
        return None
    return whole


@torch.no_grad()
def _greedy(model: Any, formatter: Formatter, texts: list[Encoded]) -> list[bool]:
    """Whether each target is the model's greedy continuation: every token the argmax after those before it."""
    if not texts:
        return []
    batch = formatter.batch(texts)
    right = scored_logits(model, batch).argmax(-1) == batch.label
    return [bool(all_right) for all_right in all_by_row(right, batch.row, batch.size).tolist()]
