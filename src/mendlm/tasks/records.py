"""The user's own requests, as JSON Lines.

    {"prompt": ..., "target": ..., "rephrasings": [...], "unrelated": [{"prompt": ..., "answer"?: ..., "kind"?: ...}],
     "subject"?: ..., "portability"?: [{"prompt": ..., "answer": ..., "kind"?: ...}]}

Only `prompt` and `target` are required. A prompt that ends with a question mark has a whole answer as its target;
any other prompt is continued by it.
"""

from __future__ import annotations

from mendlm.tasks.base import EditExample, Fields, Task, is_question


class Records(Task):
    """JSON Lines of the user's own."""

    name = "records"

    def parse(self, fields: Fields) -> EditExample:
        """One record as a request. An unknown field is refused, since it would be silently ignored."""
        known = {"prompt", "target", "rephrasings", "unrelated", "subject", "portability"}
        unknown = sorted(set(fields.record) - known)
        if unknown:
            raise fields.error(unknown[0], f"is unknown; the fields are {', '.join(sorted(known))}")
        prompt = fields.text("prompt")
        return EditExample(
            prompt=prompt,
            target=fields.text("target"),
            rephrasings=fields.texts("rephrasings"),
            unrelated=fields.probes("unrelated"),
            portability=fields.probes("portability", answered=True),
            subject=fields.optional("subject"),
            question=is_question(prompt),
        )
