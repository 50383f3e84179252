"""KnowEdit (Zhang et al., 2024): its ZsRE, Wiki-recent and Wiki-counterfact files.

Fields: `prompt`, `target_new`; `subject`, `ground_truth` and `rephrase` or `rephrase_prompt` may be there. `portability` and
`locality` map groups ("Reasoning", "Subject_Aliasing", "Relation_Specificity", ...) to lists of objects with `prompt` and
`ground_truth`; a group's name becomes the probe's `kind`. Of a ground truth that is a list, or lists in a list, the first
text is taken. A record's own may be empty, as one published is, and then names no old answer. A prompt that ends with a
question mark has a whole answer as its target; any other is continued by it.

The files of WikiBio, ConvSent and Sanitation have other fields and are not read.
"""

from __future__ import annotations

from mendlm.tasks.base import EditExample, Fields, Probe, Task, is_question, is_text


class KnowEdit(Task):
    """KnowEdit."""

    name = "knowedit"

    def parse(self, fields: Fields) -> EditExample:
        """One record as a request."""
        fields.refuse("locality_prompt", of="flat CounterFact; a KnowEdit record has locality")
        prompt = fields.text("prompt")
        rephrasings = (fields.optional("rephrase"), fields.optional("rephrase_prompt"))
        return EditExample(
            prompt=prompt,
            target=fields.text("target_new"),
            old=_first(fields, "ground_truth") if fields.record.get("ground_truth") != "" else None,
            rephrasings=tuple(text for text in rephrasings if text),
            unrelated=_grouped(fields, "locality"),
            portability=_grouped(fields, "portability"),
            subject=fields.optional("subject"),
            question=is_question(prompt),
        )


def _grouped(fields: Fields, field: str) -> tuple[Probe, ...]:
    """The probes of every group. What should follow from an edit needs an answer; what should stay may lack one."""
    if fields.record.get(field) is None:
        return ()
    groups = fields.inside(field, fields.record[field])
    probes = []
    for kind in groups.record:
        if not is_text(kind):
            raise groups.error(ascii(kind), "holds half of a surrogate pair, which is no character")
        for entry in groups.objects(kind):
            answer = _first(entry, "ground_truth")
            if answer is None and field == "portability":
                raise entry.error("ground_truth", "is missing, but what follows from an edit has an answer")
            probes.append(Probe(entry.text("prompt"), answer, kind))
    return tuple(probes)


def _first(fields: Fields, field: str) -> str | None:
    """The first text of a field that may be a text, a list or lists in a list."""
    value = fields.record.get(field)
    while isinstance(value, list):
        if not value:
            raise fields.error(field, "expected a text or a list of texts, got an empty list")
        value = value[0]
    return None if value is None else Fields(fields.path, fields.line, {field: value}, fields.within).text(field)
