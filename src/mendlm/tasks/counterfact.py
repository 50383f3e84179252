"""CounterFact in its flat form: one record a counterfactual statement (Meng et al., "ROME", 2022).

Fields: `prompt`, `target_new`, `rephrase_prompt`, `locality_prompt` (a neighbour with the same true answer) with
`locality_ground_truth`; `subject` and `ground_truth` may be there. Targets continue the prompt.
"""

from __future__ import annotations

from mendlm.tasks.base import EditExample, Fields, Probe, Task


class CounterFact(Task):
    """Flat CounterFact."""

    name = "counterfact"

    def parse(self, fields: Fields) -> EditExample:
        """One record as a continuation request."""
        rephrasing, neighbour = fields.optional("rephrase_prompt"), fields.optional("locality_prompt")
        return EditExample(
            prompt=fields.text("prompt"),
            target=fields.text("target_new"),
            rephrasings=(rephrasing,) if rephrasing else (),
            unrelated=(Probe(neighbour, fields.optional("locality_ground_truth")),) if neighbour else (),
            subject=fields.optional("subject"),
        )
