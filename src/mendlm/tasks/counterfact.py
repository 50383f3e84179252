"""CounterFact: counterfactual statements (Meng et al., "ROME", 2022), in two forms. Targets continue the prompt.

Flat, as editing frameworks use it: `prompt`, `target_new`, `rephrase_prompt`, `locality_prompt` (a neighbour with the same
true answer) with `locality_ground_truth`; `subject` and `ground_truth` may be there.

As published: `requested_rewrite` holds `prompt` with "{}" for the `subject`, and `target_new` and `target_true` with their
text in `str`; `paraphrase_prompts` and `neighborhood_prompts` are lists, and the answer to every neighbour is `target_true`.
"""

from __future__ import annotations

from mendlm.tasks.base import EditExample, Fields, Probe, Task


class CounterFact(Task):
    """CounterFact, flat or as published."""

    name = "counterfact"

    def parse(self, fields: Fields) -> EditExample:
        """One record as a continuation request."""
        if "requested_rewrite" in fields.record:
            return _published(fields)
        for field in ("locality", "portability"):
            fields.refuse(field, of="KnowEdit; a CounterFact record has locality_prompt, and no portability")
        rephrasing, neighbour = fields.optional("rephrase_prompt"), fields.optional("locality_prompt")
        return EditExample(
            prompt=fields.text("prompt"),
            target=fields.text("target_new"),
            old=fields.optional("ground_truth"),
            rephrasings=(rephrasing,) if rephrasing else (),
            unrelated=(Probe(neighbour, fields.optional("locality_ground_truth")),) if neighbour else (),
            subject=fields.optional("subject"),
        )


def _published(fields: Fields) -> EditExample:
    request = fields.inside("requested_rewrite", fields.record["requested_rewrite"])
    template, subject = request.text("prompt"), request.text("subject")
    if "{}" not in template:
        raise request.error("prompt", f"has no {{}} where the subject belongs: {template!r}")
    new, true = (request.inside(name, request.record.get(name)).text("str") for name in ("target_new", "target_true"))
    return EditExample(
        prompt=template.replace("{}", subject),
        target=new,
        old=true,
        rephrasings=fields.texts("paraphrase_prompts"),
        unrelated=tuple(Probe(neighbour, true) for neighbour in fields.texts("neighborhood_prompts")),
        subject=subject,
    )
