"""Pure functions from outcomes to numbers: intervals, text matches. Need no model and no tensors.

What the metrics mean:

- success: every target token (the end token apart) is the argmax under teacher forcing, on the exact prompt;
- generality: the same, mean over the rephrasings;
- edit_success: the paper's ES, the mean over the exact prompt and its rephrasings together; edit_success_release: as the
  released code has it, on the first rephrasing alone (on the prompt where there is none);
- success_of_new, edit_success_of_new: the same without the requests whose target the base model gives to the prompt already;
- token_accuracy: the share of target tokens that are the argmax, on the exact prompt;
- new_over_old (Meng et al., 2022): the share of prompts (efficacy) and rephrasings (paraphrase) where the target is likelier
  than the old answer, and of neighbours with that old answer where it is still likelier than the target (neighbourhood);
  likelier by mean NLL of its tokens; score is the harmonic mean of the three, its interval over edits that have all of them;
- portability: success on prompts whose answers follow from the edit, by the kinds that the data names;
- success_when_made: of edits made one after another, success right after its own edit, before the later ones; of_earlier and
  of_later: success after all of them, of the first and the second half of a group;
- locality: the share of unrelated prompts whose answer tokens (without an answer: the base model's own first 5 greedy
  tokens) keep the base model's argmax; locality_by_kind: by the kinds that the data names;
- unrelated_kl: KL from the base's to the edited model's distribution at the tokens of unrelated answers and running text;
- unrelated_accuracy: success on unrelated prompts whose answer is known;
- drawdown: what unrelated texts lose from base to edited model: accuracy decrease, and perplexity increase; each has the 95 %
  bootstrap interval over edits in NAME_interval;
- generated: by greedy generation with natural stop, the text equals the target after stripping space and final
  punctuation (question tasks), or begins with it at a word boundary (continuations); contained: the text holds the target
  anywhere, whatever its case; in context: generated behind another text;
- weight_change: the Frobenius norm of the edit, layer by layer.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

FORMAT = "mendlm-summary-1"
"""What a file of the summary below says that it is."""
RIVALS = {"efficacy": "prompt", "paraphrase": "rephrasing", "neighbourhood": "neighbour"}
"""Scores of new over old answers -> where a row keeps them."""
Unit = TypeVar("Unit")


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
    return interval(values, lambda some: sum(some) / len(some), seed=seed, resamples=resamples)


def interval(
    units: Sequence[Unit], statistic: Callable[[Sequence[Unit]], float], *, seed: int = 0, resamples: int = 1000
) -> tuple[float | None, float | None]:
    """The 95 % percentile bootstrap interval of a statistic over units; None of nothing."""
    if not units:
        return None, None
    rng = random.Random(seed)
    found = sorted(statistic(rng.choices(units, k=len(units))) for _ in range(resamples))
    return found[int(0.025 * resamples)], found[int(0.975 * resamples) - 1]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that a share (0 to 1) of the values does not exceed: the nearest rank."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _bare(text: str) -> str:
    return text.strip().rstrip(".!?,;:").rstrip()


def answers(generated: str, target: str) -> bool:
    """Whether a generated text is the target, apart from surrounding space and final punctuation."""
    return (_bare(generated) or generated.strip()) == (_bare(target) or target.strip())


def contains(generated: str, target: str) -> bool:
    """Whether a generated text holds the target somewhere, between word boundaries and whatever the case."""
    return re.search(rf"(?<!\w){re.escape(_bare(target).lower())}(?!\w)", generated.lower()) is not None


def continues(generated: str, target: str) -> bool:
    """Whether a generated text begins with the target, ending at a word boundary."""
    generated, target = generated.lstrip(), target.strip()
    following = generated[len(target) :]
    goes_on = following[:1].isalnum() and target[-1:].isalnum()
    longer_number = target[-1:].isdigit() and re.match(r"[.,]\d", following) is not None
    return generated.startswith(target) and not goes_on and not longer_number


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
        name: before_after([row.get("new_over_old", {}).get(where, []) for row in rows]) for name, where in RIVALS.items()
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
            "score": {
                **{side: harmonic_mean([r[side] for r in rivals.values()]) for side in ("before", "after")},
                **dict(zip(("low", "high"), _score_interval(rows, seed), strict=True)),
            },
        },
        "portability": {
            kind: before_after([[p["right"] for p in row["portability"] if (p["kind"] or "") == kind] for row in rows])
            for kind in kinds
        },
        "already_given": len(rows) - len(new),
        "success_of_new": before_after([[row["success"]] for row in new]),
        "edit_success_of_new": before_after([[row["success"], *row["generality"]] for row in new]),
        **{
            f"{name}_{how}": before_after([row.get(f"{name}_{how}", []) for row in rows])
            for how in ("generated", "contained")
            for name in ("success", "generality", *(["context"] if "context_text" in rows[0] else []))
        },
    }
    if "success_when_made" in rows[0]:
        half = max(row["turn"] for row in rows) / 2
        summary["success_when_made"] = before_after([[row["success_when_made"]] for row in rows])
        summary["success_of_earlier"] = before_after([[row["success"]] for row in rows if row["turn"] < half])
        summary["success_of_later"] = before_after([[row["success"]] for row in rows if row["turn"] > half])

    def locality(kind: str | None) -> dict[str, float | None]:
        watched = [[p["kept"] for p in row["locality"] if kind in (None, p["kind"])] for row in rows]
        kept = [sum(some) / len(some) for some in watched if some]
        low, high = bootstrap(kept, seed=seed)
        return {"after": mean(kept), "low": low, "high": high}

    summary["locality"] = locality(None)
    named = sorted({p["kind"] for row in rows for p in row["locality"] if p["kind"]})
    summary["locality_by_kind"] = {kind: locality(kind) for kind in named}
    summary["weight_change"] = {name: mean([row["norm"][name] for row in rows]) for name in rows[0]["norm"]}
    summary |= _unrelated(rows, seed, labels)
    return summary


def _score_interval(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[float | None, float | None]:
    """The interval of the harmonic mean of the three rivals after the edit, over edits that have all of them."""
    found = [[row.get("new_over_old", {}).get(where) for where in RIVALS.values()] for row in rows]
    units = [[sum(after for _, after in texts) / len(texts) for texts in one] for one in found if all(one)]

    def score(some: Sequence[Sequence[float]]) -> float:
        return harmonic_mean([sum(kind) / len(some) for kind in zip(*some, strict=True)]) or 0.0

    return interval(units, score, seed=seed)


def _unrelated(rows: Sequence[Mapping[str, Any]], seed: int, labels: bool) -> dict[str, Any]:
    """What happens to unrelated texts, those of all edits together; intervals are over edits."""
    prose = [[row["prose"]] if "prose" in row else [] for row in rows]
    answered = [[p for p in row["locality"] if p["answered"]] for row in rows]
    both = [[*row["locality"], *passages] for row, passages in zip(rows, prose, strict=True)]
    read = [] if labels else prose if any(prose) else answered

    def spread(sums: Sequence[Sequence[float]], statistic: Callable[..., float]) -> tuple[float | None, list[float | None]]:
        """A statistic of sums over edits, and its interval."""

        def of(some: Sequence[Sequence[float]]) -> float:
            return statistic(*map(sum, zip(*some, strict=True)))

        return of(sums) if sums else None, [*interval(sums, of, seed=seed)]

    kls = [(sum(p["kl"] for p in some), len(some)) for some in both if some]
    rights = [(*(sum(p["right"][side] for p in some) for side in (0, 1)), len(some)) for some in answered if some]
    nlls = [
        (*(sum(p["nll"][side] * p["tokens"] for p in some) for side in (0, 1)), sum(p["tokens"] for p in some))
        for some in read
        if some
    ]
    summary: dict[str, Any] = {}
    summary["unrelated_kl"], summary["unrelated_kl_interval"] = spread(kls, lambda total, count: total / count)
    (was, _), (now, (low, high)) = (spread(rights, lambda *s, side=side: s[side] / s[2]) for side in (0, 1))
    summary["unrelated_accuracy"] = {"before": was, "after": now, "low": low, "high": high}
    summary["drawdown_acc"], summary["drawdown_acc_interval"] = spread(rights, lambda b, a, count: (b - a) / count)
    (was, _), (now, (low, high)) = (spread(nlls, lambda *s, side=side: _perplexity(s[side], s[2])) for side in (0, 1))
    summary["perplexity"] = {"before": was, "after": now, "low": low, "high": high}
    summary["drawdown_ppl"], summary["drawdown_ppl_interval"] = spread(
        nlls, lambda b, a, tokens: _perplexity(a, tokens) - _perplexity(b, tokens)
    )
    return summary


def _perplexity(nll: float, tokens: float) -> float:
    return math.exp(min(700.0, nll / tokens))  # e^710 overflows
