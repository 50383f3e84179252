"""Sources of unrelated text, for locality: Natural Questions, and raw text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mendlm.tasks.base import Fields, Probe, Task, read_text
from mendlm.tasks.zsre import as_question


class NaturalQuestions(Task):
    """Open Natural Questions, JSON Lines of `question` and `answer`, a list whose first entry is taken."""

    name = "nq"

    def parse(self, fields: Fields) -> Probe:
        """One question with its answer."""
        answers = fields.texts("answer")
        if not answers:
            raise fields.error("answer", "expected a list with at least one answer")
        return Probe(as_question(fields.text("question")), answers[0])


class RawText(Task):
    """Raw text: passages of `2 * WORDS` words within one line; the second half is the answer to the first."""

    name = "text"
    prose = True
    WORDS = 16

    def records(self, path: Path) -> Iterator[tuple[int, Any]]:
        """Every passage, with the number of its line."""
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            words = line.split()
            for start in range(0, len(words) - 2 * self.WORDS + 1, 2 * self.WORDS):
                first, second = words[start : start + self.WORDS], words[start + self.WORDS : start + 2 * self.WORDS]
                yield number, {"prompt": " ".join(first), "answer": " ".join(second)}

    def parse(self, fields: Fields) -> Probe:
        """One passage."""
        return Probe(fields.text("prompt"), fields.text("answer"))
