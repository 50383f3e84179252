"""Zero-shot relation extraction questions (Levy et al., 2017), in two forms. Targets are whole answers.

Flat, as prepared for MEND: `src` (the question), `alt` (the edit target), `rephrase`, `loc` with `loc_ans` (an unrelated
question, often with the prefix "nq question: "); `subject`, `pred`, `answers` (the truth) and `cond` may be there.
`portability` with "New Question" and "New Answer" is read where present; its answer follows from the edit in one step.

KILT style: `input` (the question), `alternatives` (one of them, chosen by a hash, is the edit target),
`filtered_rephrases`, `output` (objects with the true `answer`); `prediction` may be there. The unrelated question of a
request is that of another record, with its first true answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from mendlm.tasks.base import EditExample, Fields, Probe, Task, chance, exchange

VERDICTS = ("SUPPORTS", "REFUTES")
"""What FEVER in KILT style has where zsRE has answers."""
_PREFIX = "nq question: "
_EXCHANGED = "unrelated questions are those of other zsRE records"


class ZsRE(Task):
    """zsRE, flat or in KILT style."""

    name = "zsre"

    def parse(self, fields: Fields) -> EditExample:
        """One record as a question request."""
        return self._kilt(fields) if "input" in fields.record else _flat(fields)

    def _kilt(self, fields: Fields) -> EditExample:
        fields.refuse("logit", of="FEVER in KILT style; zsRE has no such field")
        question, alternatives = fields.text("input"), fields.texts("alternatives")
        if not alternatives:
            raise fields.error("alternatives", "expected a list with at least one answer, which becomes the edit target")
        truth = kilt_answer(fields)
        if truth in VERDICTS:
            raise fields.error("output", f"has {truth!r}, FEVER's verdict on a claim, for an answer to a question")
        return EditExample(
            prompt=question,
            target=alternatives[int(chance("alternative", self.seed, question) * len(alternatives))],
            old=truth,
            rephrasings=kilt_rephrasings(fields),
            unrelated=(Probe(question, truth),),
            question=True,
        )

    def finish(self, examples: list[EditExample]) -> list[EditExample]:
        """Records in KILT style get the question of another record."""
        return exchange(examples)

    def notes(self, examples: Sequence[EditExample]) -> tuple[str, ...]:
        """Whether unrelated questions were exchanged."""
        prompts = {example.prompt for example in examples}
        return (_EXCHANGED,) if any(probe.prompt in prompts for e in examples for probe in e.unrelated) else ()


def _flat(fields: Fields) -> EditExample:
    rephrasing, unrelated, answers = fields.optional("rephrase"), fields.optional("loc"), fields.texts("answers")
    portability: tuple[Probe, ...] = ()
    given = fields.record.get("portability")
    if given is not None:
        if not isinstance(given, dict):
            raise fields.error("portability", f"expected an object with fields, got {type(given).__name__}")
        inner = Fields(fields.path, fields.line, given)
        portability = (Probe(inner.text("New Question"), inner.text("New Answer"), "one_hop"),)
    target = fields.text("alt")
    return EditExample(
        prompt=fields.text("src"),
        target=target,
        old=next((answer for answer in answers if answer != target), None) if answers else fields.optional("pred"),
        rephrasings=(rephrasing,) if rephrasing else (),
        unrelated=(Probe(as_question(unrelated), fields.optional("loc_ans")),) if unrelated else (),
        portability=portability,
        subject=fields.optional("subject"),
        question=True,
    )


def kilt_answer(fields: Fields) -> str:
    """The first true answer of a record in KILT style: `output` lists answers, and evidence without one."""
    for output in fields.objects("output"):
        answer = output.optional("answer")
        if answer is not None:
            return answer
    raise fields.error("output", "expected a list of objects, one of them with an 'answer'")


def kilt_rephrasings(fields: Fields) -> tuple[str, ...]:
    """The rephrasings of a record in KILT style, without those that are the input itself."""
    return tuple(text for text in fields.texts("filtered_rephrases") if text != fields.record["input"])


def as_question(text: str) -> str:
    """A Natural Questions query as a question: without the prefix of the MEND files, with a question mark."""
    question = text.removeprefix(_PREFIX).strip()
    return question if question.endswith("?") else f"{question}?"
