"""MALMEN: MEND's network, with many edits merged by least squares instead of summed.

Tan, Zhang and Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024. The network's step for one
token j would change the layer's output for that token's own input `u_j` by

    d_j = -alpha * delta~_j (u~_j . u_j)

Summed steps of many requests disturb each other. The update that gives every token its own change, as nearly as a damped
least-squares fit can, with `U` (rows, d_in) and `D` (rows, d_out) of all requests at once, is

    dW = D^T U (U^T U + lambda I)^-1

`lambda` is learned, one a layer. In rows: `delta = D`, `u = U (U^T U + lambda I)^-1`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mendlm.apply import Edit
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.lowrank import LowRank
from mendlm.methods.base import transposed
from mendlm.methods.network import NetworkConfig, RowEditor
from mendlm.text import Batch


@dataclass(frozen=True, kw_only=True)
class MalmenConfig(NetworkConfig):
    """The shape of a MALMEN editor."""

    initial_damping: float = 1.0
    """Where each layer's learned lambda starts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.initial_damping > 0:
            raise InputError(f"initial_damping must be above 0, got {self.initial_damping}")


class Malmen(RowEditor):
    """A MALMEN editor. Its edits hold what each token asks for; `combine` merges them."""

    name = "malmen"

    def __init__(self, specs: Sequence[LayerSpec], config: MalmenConfig | None = None) -> None:
        config = config or MalmenConfig()
        super().__init__(specs, config)
        self.log_damping = nn.Parameter(torch.full((len(self.specs),), math.log(config.initial_damping)))

    def rates(self) -> list[nn.Parameter]:
        """The logarithms of each layer's learned rate alpha and damping lambda."""
        return [self.log_rates, self.log_damping]

    def parts(self, model: Any, batch: Batch) -> Edit:
        """What each token asks for: rows `u_j` and `d_j`. Not an update before `combine` has merged them."""
        gradient = self.gradient(model, batch)
        rows = {}
        for name, changed in self.changed(gradient).items():
            raw = gradient[name].pad(changed.rows)
            u = (raw.u * (raw.delta != 0).any(-1, keepdim=True)).to(changed.u.dtype)  # a row without a gradient asks nothing
            rows[name] = LowRank(u, changed.delta * (changed.u * u).sum(-1, keepdim=True))
        return Edit(rows, transposed(self.specs))

    def combine(self, parts: Edit, size: int) -> Edit:
        """The least-squares update of all rows of each `size` consecutive requests; never more than d_in rows."""
        together = parts.grouped(size).updates
        updates = {}
        for spec, damping in zip(self.specs, self.log_damping.exp(), strict=True):
            u, wanted = together[spec.name].u, together[spec.name].delta
            fit = damped(u, damping)
            if fit.shape[-2] > spec.d_in:
                eye = torch.eye(spec.d_in, dtype=fit.dtype, device=fit.device).expand(*fit.shape[:-2], -1, -1)
                fit, wanted = eye, fit.mT @ wanted
            updates[spec.name] = LowRank(fit, wanted)
        return replace(parts, updates=updates)


def damped(u: Float[Tensor, "*batch rows d_in"], damping: Float[Tensor, ""]) -> Float[Tensor, "*batch rows d_in"]:
    """`U (U^T U + lambda I)^-1`, by the smaller of its two equal forms, in float64."""
    wide, precise = u.shape[-2] < u.shape[-1], u.double()
    gram = precise @ precise.mT if wide else precise.mT @ precise
    gram = gram + damping.double() * torch.eye(gram.shape[-1], dtype=gram.dtype, device=u.device)
    fit: Tensor = torch.linalg.solve(gram, precise if wide else precise.mT)
    return (fit if wide else fit.mT).to(u.dtype)
