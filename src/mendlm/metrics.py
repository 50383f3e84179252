"""Pure functions from outcomes to numbers: intervals, text matches. Need no model and no tensors.

What the metrics mean:

- success: every target token (the end token apart) is the argmax under teacher forcing, on the exact prompt;
- generality: the same, mean over the rephrasings;
- edit_success: the paper's ES, the mean over the exact prompt and its rephrasings together; edit_success_release: as the
  released code has it, on the first rephrasing alone (on the prompt where there is none);
- token_accuracy: the share of target tokens that are the argmax, on the exact prompt;
- new_over_old (Meng et al., 2022): the share of prompts (efficacy) and rephrasings (paraphrase) where the target is likelier
  than the old answer, and of neighbours with that old answer where it is still likelier than the target (neighbourhood);
  likelier by mean NLL of its tokens; score is the harmonic mean of the three;
- portability: success on prompts whose answers follow from the edit, by the kinds that the data names;
- locality: the share of unrelated prompts whose answer tokens (without an answer: the base model's own first 5 greedy
  tokens) keep the base model's argmax;
- unrelated_kl: KL from the base's to the edited model's distribution at the tokens of unrelated answers;
- drawdown: what unrelated texts lose from base to edited model: accuracy decrease, and perplexity increase;
- generated: by greedy generation with natural stop, the text equals the target after stripping space and final
  punctuation (question tasks), or begins with it at a word boundary (continuations); contained: the text holds the target
  anywhere, whatever its case; in context: generated behind another text;
- weight_change: the Frobenius norm of the edit, layer by layer.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def harmonic_mean(values: Sequence[float | None]) -> float | None:
    """The harmonic mean, 0 if any value is; None if one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return len(known) / sum(1 / value for value in known) if all(known) else 0.0


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 1000) -> tuple[float | None, float | None]:
    """The 95 % percentile bootstrap interval of the mean; None of nothing."""
    if not values:
        return None, None
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that a share (0 to 1) of the values does not exceed: the nearest rank."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _bare(text: str) -> str:
    return text.strip().rstrip(".!?,;:").rstrip()


def answers(generated: str, target: str) -> bool:
    """Whether a generated text is the target, apart from surrounding space and final punctuation."""
    return _bare(generated) == _bare(target)


def contains(generated: str, target: str) -> bool:
    """Whether a generated text holds the target somewhere, between word boundaries and whatever the case."""
    return re.search(rf"(?<!\w){re.escape(_bare(target).lower())}(?!\w)", generated.lower()) is not None


def continues(generated: str, target: str) -> bool:
    """Whether a generated text begins with the target, ending at a word boundary."""
    generated, target = generated.lstrip(), target.strip()
    following = generated[len(target) : len(target) + 1]
    return generated.startswith(target) and not (following.isalnum() and target[-1:].isalnum())


def summarise(rows: Sequence[Mapping[str, Any]], *, seed: int = 0, labels: bool = False) -> dict[str, Any]:
    """The metrics over all rows of an evaluation, with their 95 % bootstrap intervals; `labels`, a classifier's answers, have
    no perplexity."""

    def before_after(pairs: Sequence[Sequence[Sequence[bool]]]) -> dict[str, float | None]:
        """Per edit, the mean over its texts; then over edits that have any."""
        means = [[sum(side) / len(texts) for side in zip(*texts, strict=True)] for texts in pairs if texts]
        low, high = bootstrap([after for _, after in means], seed=seed)
        return {
            "before": mean([b for b, _ in means]),
            "after": mean([a for _, a in means]),
            "low": low,
            "high": high,
        }

    new = [row for row in rows if not row["success"][0]]
    rivals = {
        name: before_after([row.get("new_over_old", {}).get(where, []) for row in rows])
        for name, where in (("efficacy", "prompt"), ("paraphrase", "rephrasing"), ("neighbourhood", "neighbour"))
    }
    kinds = sorted({p["kind"] or "" for row in rows for p in row["portability"]})
    summary: dict[str, Any] = {
        "success": before_after([[row["success"]] for row in rows]),
        "generality": before_after([row["generality"] for row in rows]),
        "edit_success": before_after([[row["success"], *row["generality"]] for row in rows]),
        "edit_success_release": before_after([row["generality"][:1] or [row["success"]] for row in rows]),
        "token_accuracy": before_after([[row["token_accuracy"]] for row in rows]),
        "new_over_old": {
            **rivals,
            "score": {side: harmonic_mean([r[side] for r in rivals.values()]) for side in ("before", "after")},
        },
        "portability": {
            kind: before_after([[p["right"] for p in row["portability"] if (p["kind"] or "") == kind] for row in rows])
            for kind in kinds
        },
        "already_given": len(rows) - len(new),
        "success_of_new": before_after([[row["success"]] for row in new]),
        **{
            f"{name}_{how}": before_after([row.get(f"{name}_{how}", []) for row in rows])
            for how in ("generated", "contained")
            for name in ("success", "generality", *(["context"] if "context_text" in rows[0] else []))
        },
    }
    kept = [sum(p["kept"] for p in row["locality"]) / len(row["locality"]) for row in rows if row["locality"]]
    low, high = bootstrap(kept, seed=seed)
    summary["locality"] = {"after": mean(kept), "low": low, "high": high}
    summary["weight_change"] = {name: mean([row["norm"][name] for row in rows]) for name in rows[0]["norm"]}
    summary["unrelated_kl"] = mean([p["kl"] for row in rows for p in row["locality"]])
    answered = [p for row in rows for p in row["locality"] if p["answered"]]
    right = [mean([float(p["right"][side]) for p in answered]) for side in (0, 1)]
    summary["drawdown_acc"] = right[0] - right[1] if right[0] is not None and right[1] is not None else None
    read = [] if labels else [row["prose"] for row in rows if "prose" in row] or answered
    ppl = [_perplexity(read, side) for side in (0, 1)]
    summary["perplexity"] = {"before": ppl[0], "after": ppl[1]}
    summary["drawdown_ppl"] = ppl[1] - ppl[0] if ppl[0] is not None and ppl[1] is not None else None
    return summary


def _perplexity(texts: Sequence[Mapping[str, Any]], side: int) -> float | None:
    tokens = sum(text["tokens"] for text in texts)
    if not tokens:
        return None
    return math.exp(min(700.0, sum(text["nll"][side] * text["tokens"] for text in texts) / tokens))  # e^710 overflows
