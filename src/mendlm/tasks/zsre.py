"""Zero-shot relation extraction questions in the flat form (Levy et al., 2017; as prepared for MEND).

Fields: `src` (the question), `alt` (the edit target), `rephrase`, `loc` with `loc_ans` (an unrelated question, often with
the prefix "nq question: "); `subject`, `pred`, `answers` and `cond` may be there. `portability` with "New Question" and
"New Answer" is read where present. Targets are whole answers.
"""

from __future__ import annotations

from mendlm.tasks.base import EditExample, Fields, Probe, Task

_PREFIX = "nq question: "


class ZsRE(Task):
    """Flat zsRE."""

    name = "zsre"

    def parse(self, fields: Fields) -> EditExample:
        """One record as a question request."""
        rephrasing, unrelated = fields.optional("rephrase"), fields.optional("loc")
        portability: tuple[Probe, ...] = ()
        given = fields.record.get("portability")
        if given is not None:
            if not isinstance(given, dict):
                raise fields.error("portability", f"expected an object with fields, got {type(given).__name__}")
            inner = Fields(fields.path, fields.line, given)
            portability = (Probe(inner.text("New Question"), inner.text("New Answer")),)
        return EditExample(
            prompt=fields.text("src"),
            target=fields.text("alt"),
            rephrasings=(rephrasing,) if rephrasing else (),
            unrelated=(Probe(as_question(unrelated), fields.optional("loc_ans")),) if unrelated else (),
            portability=portability,
            subject=fields.optional("subject"),
            question=True,
        )


def as_question(text: str) -> str:
    """A Natural Questions query as a question: without the prefix of the MEND files, with a question mark."""
    question = text.removeprefix(_PREFIX).strip()
    return question if question.endswith("?") else f"{question}?"
