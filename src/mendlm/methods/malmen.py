"""MALMEN: MEND's network, with many edits merged by least squares instead of summed.

Tan, Zhang and Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024. The network's step for one
token j would change the layer's output for that token's own input `u_j` by

    d_j = -alpha * delta~_j (u~_j . u_j)

Summed steps of many requests disturb each other. The update that gives every token its own change, as nearly as a damped
least-squares fit can, with `U` (rows, d_in) and `D` (rows, d_out) of all requests at once, is

    dW = D^T U (U^T U + lambda I)^-1

`lambda` is learned, one a layer. In rows: `delta = D`, `u = U (U^T U + lambda I)^-1`.

For many requests at once only the sums `U^T U` and `U^T D` are kept, and the network's passes are run again for their
gradient, batch by batch: memory then grows with the number of requests only by what the trunk gave for them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mendlm.apply import Edit
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.lowrank import LowRank
from mendlm.methods.base import Group, transposed
from mendlm.methods.network import NetworkConfig, RowEditor
from mendlm.text import Batch, sent


@dataclass(frozen=True, kw_only=True)
class MalmenConfig(NetworkConfig):
    """The shape of a MALMEN editor."""

    initial_damping: float = 1.0
    """Where each layer's learned lambda starts."""
    decoupled_from: int = 100
    """From so many requests at once on, keep sums instead of rows, at the cost of recording each request twice in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.initial_damping > 0:
            raise InputError(f"initial_damping must be above 0, got {self.initial_damping}")


class Malmen(RowEditor):
    """A MALMEN editor. Its edits hold what each token asks for; `combine` merges them."""

    name = "malmen"
    config: MalmenConfig

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
        """The least-squares update of all rows of each `size` consecutive requests; never more rows than a layer has inputs."""
        together = parts.grouped(size).updates
        updates = {}
        for spec, damping in zip(self.specs, self.log_damping.exp(), strict=True):
            u, wanted = together[spec.name].u, together[spec.name].delta
            few = u.shape[-2] <= spec.d_in
            updates[spec.name] = fitted(u, wanted, damping) if few else solved(sums(u, wanted), damping).to(u.dtype)
        return replace(parts, updates=updates)

    def together(self, groups: Sequence[Group], size: int) -> list[tuple[list[int], Edit]]:
        """As `combine` of all parts; of many requests at once, the parts of one group at a time."""
        if size < self.config.decoupled_from:
            return super().together(groups, size)
        edits, rest = divmod(sum(len(requests) for requests, _ in groups), size)
        if rest:
            raise InputError(f"{edits * size + rest} requests do not divide into groups of {size}")
        totals: list[Any] = [0.0] * len(self.specs)
        for requests, make in groups:
            own = [[place for place, request in enumerate(requests) if request // size == edit] for edit in range(edits)]
            found = _Again.apply(functools.partial(self._sums, make, own), *self.parameters())  # type: ignore[no-untyped-call]
            totals = [a + b for a, b in zip(totals, found, strict=True)]
        updates = {}
        for spec, both, damping in zip(self.specs, totals, self.log_damping.exp(), strict=True):
            updates[spec.name] = solved(both, damping).to(self.log_rates.dtype)
        return [(list(range(edits)), Edit(updates, transposed(self.specs)))]

    def _sums(self, make: Callable[[], Edit], own: list[list[int]]) -> list[Tensor]:
        """`U^T [U, D]` of each layer, (edits, d_in, d_in + d_out), over each edit's own parts, in float64."""
        parts, found = make(), []
        for spec in self.specs:
            u, delta = parts.updates[spec.name].u, parts.updates[spec.name].delta
            places = [sent(torch.tensor(mine, dtype=torch.long), u.device) for mine in own]
            found.append(torch.stack([sums(u[mine].flatten(0, 1), delta[mine].flatten(0, 1)) for mine in places]))
        return found


class _Again(torch.autograd.Function):
    """Runs a function without a graph, and once more for its gradient in the parameters."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[], list[Tensor]], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.parameters = function, parameters
        return tuple(function())

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            outputs = ctx.function()
        return None, *torch.autograd.grad(outputs, ctx.parameters, slopes, allow_unused=True)


def fitted(u: Float[Tensor, "*batch rows d_in"], wanted: Float[Tensor, "*batch rows d_out"], damping: Tensor) -> LowRank:
    """The least-squares update in as many rows as were asked for, by `(U U^T + lambda I)^-1 U`, in float64."""
    precise = u.double()
    gram = precise @ precise.mT
    return LowRank(torch.linalg.solve(_damped(gram, damping), precise).to(u.dtype), wanted)


def sums(u: Float[Tensor, "*batch rows d_in"], wanted: Float[Tensor, "*batch rows d_out"]) -> Float[Tensor, "*batch d_in both"]:
    """`U^T [U, D]`, (d_in, d_in + d_out), in float64: all that the least-squares update takes of any number of rows."""
    return u.double().mT @ torch.cat([u, wanted], -1).double()


def solved(both: Float[Tensor, "*batch d_in both"], damping: Tensor) -> LowRank:
    """The least-squares update from the `sums` of its rows, in float64; no more rows than the layer has inputs or outputs."""
    d_in = both.shape[-2]
    gram, wanted = both[..., :d_in], both[..., d_in:]
    return LowRank.from_dense(torch.linalg.solve(_damped(gram, damping), wanted).mT)


def _damped(gram: Tensor, damping: Tensor) -> Tensor:
    return gram + damping.to(gram) * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
