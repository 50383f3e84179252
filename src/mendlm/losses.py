"""Pure functions of logits: token NLL, KL, Bernoulli.

Every function takes logits at *scored positions* only and the index of the example that each position belongs to, and
gives one number an example. All are computed in float32 or better (float64 stays).

Legend: `logits` (scored, vocab), `label` and `row` (scored,); results (size,).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def mean_by_row(values: Float[Tensor, "scored"], row: Int[Tensor, "scored"], size: int) -> Float[Tensor, "size"]:
    """The mean of each example's values; 0 for an example without any."""
    total = values.new_zeros(size).index_add(0, row, values)
    count = values.new_zeros(size).index_add(0, row, torch.ones_like(values))
    return total / count.clamp(min=1)


def all_by_row(flags: Bool[Tensor, "scored"], row: Int[Tensor, "scored"], size: int) -> Bool[Tensor, "size"]:
    """Whether all of each example's flags are set; True for an example without any."""
    return torch.zeros(size, device=flags.device).index_add(0, row, (~flags).float()) == 0


def token_nll(
    logits: Float[Tensor, "scored vocab"], label: Int[Tensor, "scored"], row: Int[Tensor, "scored"], size: int
) -> Float[Tensor, "size"]:
    """`-log p(y | x)` of each example, mean over its target tokens: the paper's `L_e`."""
    return mean_by_row(F.cross_entropy(_precise(logits), label, reduction="none"), row, size)


def token_kl(
    base: Float[Tensor, "scored vocab"], edited: Float[Tensor, "scored vocab"], row: Int[Tensor, "scored"], size: int
) -> Float[Tensor, "size"]:
    """`KL(p_base || p_edited)` of each example, mean over its scored positions: the paper's `L_loc`."""
    log_base, log_edited = _precise(base).log_softmax(-1), _precise(edited).log_softmax(-1)
    return mean_by_row((log_base.exp() * (log_base - log_edited)).sum(-1), row, size)


def bernoulli_nll(logits: Float[Tensor, "size"], label: Float[Tensor, "size"]) -> Float[Tensor, "size"]:
    """`-log p(y)` of a binary label under one logit."""
    return F.binary_cross_entropy_with_logits(_precise(logits), label.to(_precise(logits).dtype), reduction="none")


def bernoulli_kl(base: Float[Tensor, "size"], edited: Float[Tensor, "size"]) -> Float[Tensor, "size"]:
    """The exact KL between two Bernoulli distributions given by their logits."""
    base, edited = _precise(base), _precise(edited)
    p = base.sigmoid()
    return p * (F.logsigmoid(base) - F.logsigmoid(edited)) + (1 - p) * (F.logsigmoid(-base) - F.logsigmoid(-edited))
