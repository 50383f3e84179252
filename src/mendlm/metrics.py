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
from collections.abc import Sequence


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
