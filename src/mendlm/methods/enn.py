"""ENN, editable neural networks: a base that is trained until one step of gradient descent on it is a good edit.

Sinitsin et al., "Editable Neural Networks", ICLR 2020. With the base's weights `W` changed to `W + C` and a learned rate
`alpha` a layer,

    W' = W + C - alpha * dL/dW (W + C)

`C` and `alpha` are trained through the step, second order. What the paper trains in the whole base is trained here in the
edited layers, so that the trunk below them is shared with the user's own base, against which locality is measured. `C` is
dense: this is a yardstick, not a method for large models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mendlm.apply import Edit, applied
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.lowrank import LowRank
from mendlm.methods.base import Learned, transposed
from mendlm.text import Batch


@dataclass(frozen=True, kw_only=True)
class EnnConfig:
    """The shape of an ENN editor."""

    layers: tuple[str, ...] = ()
    """Patterns of the layers to change and to edit; empty: the paper's choice for the architecture."""
    initial_rate: float = 1e-2
    """Where each layer's learned rate alpha starts."""

    def __post_init__(self) -> None:
        if not self.initial_rate > 0:
            raise InputError(f"initial_rate must be above 0, got {self.initial_rate}")


class Enn(Learned):
    """A changed base and learned rates, for the given layers of one model."""

    name = "enn"
    learning_rate = 1e-4
    needs_whole_base = True

    def __init__(self, specs: Sequence[LayerSpec], config: EnnConfig | None = None) -> None:
        config = config or EnnConfig()
        super().__init__(specs, config)
        self.changes = nn.ParameterList(torch.zeros(spec.d_out, spec.d_in) for spec in self.specs)
        self.log_rates = nn.Parameter(torch.full((len(self.specs),), math.log(config.initial_rate)))

    def rates(self) -> list[nn.Parameter]:
        """The logarithm of each layer's learned rate alpha."""
        return [self.log_rates]

    def changed_base(self) -> Edit:
        """`C`, as a dense edit of the user's base."""
        changes = {spec.name: LowRank.from_dense(c) for spec, c in zip(self.specs, self.changes, strict=True)}
        return Edit(changes, transposed(self.specs))

    def parts(self, model: Any, batch: Batch) -> Edit:
        """One step of gradient descent on the changed base, for each example; to be used on top of it."""
        again = torch.is_grad_enabled()
        # No fused attention has a second derivative.
        with applied(model, self.changed_base()), sdpa_kernel(SDPBackend.MATH):
            gradient, _ = self.record(model, batch, differentiable=again)
        rates = dict(zip((spec.name for spec in self.specs), self.log_rates.exp(), strict=True))
        steps = {name: rows.to(self.log_rates.dtype) * -rates[name] for name, rows in gradient.items()}
        return Edit(steps, transposed(self.specs))
