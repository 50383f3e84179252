"""FEVER fact checking (Thorne et al., 2018), in two forms: a claim is the prompt, "SUPPORTS" or "REFUTES" the target.

Claims, as published: `claim` and `label`. A claim labelled "NOT ENOUGH INFO" is no request and is left out.

KILT style, as prepared for MEND: `input` (the claim), `logit` (of the base model; above 0 it says SUPPORTS), `output`
(objects with the true `answer`) and `filtered_rephrases`; `prediction` and `alternatives` may be there.

The target is the label, in KILT style the base model's answer, flipped or kept with probability 1/2: the coin is a hash of
the claim. The unrelated claim of a request is that of another record, with its true label.

Published claims have no rephrasings. `rephrasings` makes some by rule and says so in the data's notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mendlm.tasks.base import EditExample, Fields, Probe, Task, chance, exchange
from mendlm.tasks.zsre import VERDICTS as LABELS
from mendlm.tasks.zsre import kilt_answer, kilt_rephrasings

NO_REQUEST = "NOT ENOUGH INFO"

TEMPLATES = (
    "Claim: {}",
    "True or false? {}",
    "Someone told me this: {}",
    "I have read the following. {}",
    "Check this statement. {}",
    "The statement is: {}",
)
"""What is put around a claim."""

WORDING = (
    ("film", "movie"),
    ("films", "movies"),
    ("television", "TV"),
    ("singer", "vocalist"),
    ("novel", "work of fiction"),
    ("began", "started"),
    ("died", "passed away"),
    ("currently", "presently"),
    ("located in", "situated in"),
    ("is not", "isn't"),
    ("was not", "wasn't"),
    ("has not", "hasn't"),
    ("did not", "didn't"),
    ("does not", "doesn't"),
    ("cannot", "can't"),
)
"""Words that may stand for one another in a claim, in both directions; none changes the article before it."""
_EXCHANGE = {one: other for pair in WORDING for one, other in (pair, pair[::-1])}
_WORDS = re.compile(rf"\b({'|'.join(map(re.escape, sorted(_EXCHANGE, key=len, reverse=True)))})\b")


class Fever(Task):
    """FEVER, as claims or in KILT style."""

    name = "fever"

    def parse(self, fields: Fields) -> EditExample | None:
        """One claim as a request; None where there is not enough information."""
        if "input" in fields.record:
            claim, label, said = fields.text("input"), kilt_answer(fields), _said(fields)
            own = kilt_rephrasings(fields)
        else:
            claim, label, own = fields.text("claim"), fields.text("label"), ()
            said = label
        if label == NO_REQUEST:
            return None
        if label not in LABELS:
            field = "output" if "input" in fields.record else "label"
            raise fields.error(field, f"expected SUPPORTS, REFUTES or {NO_REQUEST}, got {label!r}")
        flip = chance("flip", self.seed, claim) < 0.5
        return EditExample(
            prompt=claim,
            target=LABELS[1 - LABELS.index(said)] if flip else said,
            old=said if flip else None,
            rephrasings=own or rephrasings(claim, self.seed),
            unrelated=(Probe(claim, label),),
            question=True,
        )

    def finish(self, examples: list[EditExample]) -> list[EditExample]:
        """Each claim gets another one as its unrelated text."""
        return exchange(examples)

    def notes(self, examples: Sequence[EditExample]) -> tuple[str, ...]:
        """How targets, unrelated claims and rephrasings are made."""
        made = sum(e.rephrasings == rephrasings(e.prompt, self.seed) for e in examples)
        coin = f"FEVER targets are flipped or kept with probability 1/2, seed {self.seed}"
        exchanged = "unrelated claims are those of other FEVER records"
        templated = f"rephrasings of {made} of {len(examples)} FEVER claims are made by mendlm's templates"
        return (coin, exchanged, templated) if made else (coin, exchanged)


def rephrasings(claim: str, seed: int) -> tuple[str, ...]:
    """Three rephrasings by rule: the claim with words exchanged, where it has any, and inside two or three templates."""
    ranked = sorted(TEMPLATES, key=lambda template: chance("template", seed, template, claim))
    reworded = _WORDS.sub(lambda match: _EXCHANGE[match[0]], claim)
    return tuple([reworded] * (reworded != claim) + [template.format(claim) for template in ranked])[:3]


def _said(fields: Fields) -> str:
    """The base model's answer, by its logit."""
    logit = fields.record.get("logit")
    if isinstance(logit, bool) or not isinstance(logit, int | float) or not math.isfinite(logit):
        raise fields.error(
            "logit",
            f"expected a number, the base model's logit of SUPPORTS, got {logit!r}; claims without it are read from the "
            "fields 'claim' and 'label'",
        )
    return LABELS[0] if logit > 0 else LABELS[1]
