"""Pure functions from outcomes to numbers: intervals, text matches. Need no model and no tensors.

What the metrics mean:

- success: every target token (the end token apart) is the argmax under teacher forcing, on the exact prompt;
- generality: the same, mean over the rephrasings;
- locality: the share of unrelated prompts whose answer tokens (without an answer: the base model's own first 5 greedy
  tokens) keep the base model's argmax;
- drawdown: what unrelated texts lose from base to edited model: accuracy decrease, and perplexity increase;
- generated: by greedy generation with natural stop, the text equals the target after stripping space and final
  punctuation (question tasks), or begins with it at a word boundary (continuations).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return sum(values) / len(values) if values else None


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


def continues(generated: str, target: str) -> bool:
    """Whether a generated text begins with the target, ending at a word boundary."""
    generated, target = generated.lstrip(), target.strip()
    following = generated[len(target) : len(target) + 1]
    return generated.startswith(target) and not (following.isalnum() and target[-1:].isalnum())
