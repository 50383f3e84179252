"""Generation after Wikipedia passages (Mitchell et al., "MEND", 2022): the target is a model's own 10-token sample.

The file is one JSON object: `original`, a list of passages, and `completions`, a list of the same length; `n_tokens` says
how many tokens were sampled, which end each completion. A completion that repeats its passage, or all but the passage's end,
has as its target what follows the common beginning; where the passage goes on for itself, perhaps as the sample begins, at
least the last `n_tokens // 2` words, since words there have two tokens at most on average. Any other completion is the target
itself, and has no more words than `n_tokens`. Prompt and target part at white space, so a continuation inside a word takes
the whole word along. `mendlm data wikitext` makes such a file.

There are no published rephrasings: the neighbourhood drops up to half of the prefix, here of its words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mendlm.errors import RecordError
from mendlm.tasks.base import EditExample, Fields, Task, chance, read_text

CUTS = 3
"""Rephrasings of a prompt at most."""


class WikiText(Task):
    """Passages with sampled continuations."""

    name = "wikitext"

    def records(self, path: Path) -> Iterator[tuple[int, Any]]:
        """Every passage with its completion, by position."""
        try:
            content = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise RecordError(path, None, None, f"is not one JSON object: {error}") from None
        if not isinstance(content, dict):
            raise RecordError(path, None, None, f"expected one JSON object, got {type(content).__name__}")
        pair = []
        for field in ("original", "completions"):
            if not isinstance(content.get(field), list):
                has = ", ".join(map(repr, content)) or "none"
                raise RecordError(path, None, field, f"expected a list of texts (the object has the fields {has})")
            pair.append(content[field])
        sampled = content.get("n_tokens")
        if sampled is not None and (not isinstance(sampled, int) or sampled < 1):
            raise RecordError(path, None, "n_tokens", f"expected how many tokens were sampled, at least 1, got {sampled!r}")
        if len(pair[0]) != len(pair[1]):
            problem = f"has {len(pair[1])} entries for the {len(pair[0])} of 'original'; each passage has one completion"
            raise RecordError(path, None, "completions", problem)
        for number, (passage, completion) in enumerate(zip(*pair, strict=True), start=1):
            yield number, {"original": passage, "completions": completion, "n_tokens": sampled}

    def parse(self, fields: Fields) -> EditExample:
        """One passage and its completion as a continuation request."""
        passage, completion, sampled = fields.text("original"), fields.text("completions"), fields.record.get("n_tokens")
        differ = (i for i, (one, other) in enumerate(zip(passage, completion, strict=False)) if one != other)
        shared = next(differ, min(len(passage), len(completion)))
        if shared < len(passage) / 2:
            prompt, target = passage, completion
            if sampled is not None and len(target.split()) > sampled:
                raise fields.error("completions", f"neither continues its passage nor is a sample of {sampled} tokens")
        else:
            place = max(match.start() for match in re.finditer(r"\s|^", completion[: shared + 1]))
            if sampled is not None and shared < len(passage):
                words = [match.start() for match in re.finditer(r"\s*\S+", completion)]
                place = min(place, words[-min(len(words), max(1, sampled // 2))])
            prompt, target = completion[:place], completion[place:]
        if shared == len(completion) or not prompt.strip() or not target.strip():
            raise fields.error("completions", "does not continue its passage")
        return EditExample(prompt=prompt, target=target, rephrasings=shortened(prompt, self.seed))

    def notes(self, examples: Sequence[EditExample]) -> tuple[str, ...]:
        """How rephrasings are made."""
        return ("wikitext rephrasings drop up to half of the prefix's words",)


def shortened(prompt: str, seed: int) -> tuple[str, ...]:
    """The prompt without its first words: up to `CUTS` different cuts, each of at most half of the words."""
    starts = [match.start() for match in re.finditer(r"\S+", prompt)][1:]
    starts = starts[: (len(starts) + 1) // 2]
    chosen = sorted(starts, key=lambda start: chance("cut", seed, start, prompt))[:CUTS]
    return tuple(prompt[start:] for start in sorted(chosen))
