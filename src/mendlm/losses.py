"""Pure functions of logits: token NLL, KL, Bernoulli.

Every function takes logits at *scored positions* only and the index of the example that each position belongs to, and
gives one number an example. All are computed in float32 or better (float64 stays).

Legend: `logits` (scored, vocab), `label` and `row` (scored,); results (size,).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

POSITIONS = 64
"""Positions whose whole vocabulary is held in float32 at a time."""


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def sum_by_row(values: Float[Tensor, "scored"], row: Int[Tensor, "scored"], size: int) -> Float[Tensor, "size"]:
    """The sum of each example's values; 0 for an example without any."""
    return values.new_zeros(size).index_add(0, row, values)


def mean_by_row(values: Float[Tensor, "scored"], row: Int[Tensor, "scored"], size: int) -> Float[Tensor, "size"]:
    """The mean of each example's values; 0 for an example without any."""
    return sum_by_row(values, row, size) / sum_by_row(torch.ones_like(values), row, size).clamp(min=1)


def all_by_row(flags: Bool[Tensor, "scored"], row: Int[Tensor, "scored"], size: int) -> Bool[Tensor, "size"]:
    """Whether all of each example's flags are set; True for an example without any."""
    return sum_by_row((~flags).float(), row, size) == 0


def token_nll(
    logits: Float[Tensor, "scored vocab"],
    label: Int[Tensor, "scored"],
    row: Int[Tensor, "scored"],
    size: int,
    *,
    whole: bool = False,
) -> Float[Tensor, "size"]:
    """`-log p(y | x)` of each example, mean over its target tokens: the paper's `L_e`; of the whole target, their sum."""
    nll = F.cross_entropy(_precise(logits), label, reduction="none")
    return sum_by_row(nll, row, size) if whole else mean_by_row(nll, row, size)


def token_kl(
    base: Float[Tensor, "scored vocab"],
    edited: Float[Tensor, "scored vocab"],
    row: Int[Tensor, "scored"],
    size: int,
    *,
    scale: float = 0.0,
) -> Float[Tensor, "size"]:
    """`KL(p_base || p_edited)` of each example, mean over its scored positions: the paper's `L_loc`.

    With a scale above 0, the mean of `scale * log(1 + KL / scale)`: KL where it is small, ever flatter beyond the scale.
    Differentiable once, in `edited`. Of the vocabulary's float32 numbers it holds those of a few positions at a time.
    """
    kl: Tensor = _KL.apply(base, edited)  # type: ignore[no-untyped-call]
    return mean_by_row(scale * torch.log1p(kl / scale) if scale else kl, row, size)


class _KL(torch.autograd.Function):
    """The KL of each position; its slope, `p_edited - p_base`, is kept in the logits' own dtype."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, edited: Tensor) -> Tensor:
        kl = _precise(edited[:, 0]).clone()
        slope = torch.empty_like(edited) if ctx.needs_input_grad[1] else None
        for start in range(0, len(edited), POSITIONS):
            some = slice(start, start + POSITIONS)
            log_base, log_edited = _precise(base[some]).log_softmax(-1), _precise(edited[some]).log_softmax(-1)
            p = log_base.exp()
            kl[some] = (p * (log_base - log_edited)).sum(-1)
            if slope is not None:
                slope[some] = log_edited.exp_().sub_(p)
        ctx.save_for_backward(slope)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, slope * weights.to(slope.dtype).unsqueeze(-1)
