"""The editor network of MEND, which MALMEN shares: it turns the rows of a gradient into other rows.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022. For each token of the request and each edited layer, with
`u` the layer's input and `delta` the gradient at its output:

    z  = concat(norm(u), norm(delta))
    h  = z + relu(s1 * (U1 V1 z + b) + o1)
    g  = h + relu(s2 * U2 V2 h + o2),    split into u~, delta~

One network per distinct weight shape, shared across layers; `s`, `o` and the learned rate `alpha` are per layer. `U`
starts at zero, so the network starts as the identity.

Knows rows and layers; knows no data and no training.

In training, a layer's networks run again in the backward pass, so that only the gradient is kept: what they hold on the way is
some ten times that, and their work a small part of a step's. Where the base runs in less than float32, training takes the
networks' matrix products in bfloat16; their weights, what is around the products, and the edits that are made later, stay in
float32.

Legend: `z` (*batch, rows, width), of one layer; `width` = d_in + d_out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mendlm.apply import Edit
from mendlm.errors import InputError
from mendlm.layers import LayerSpec
from mendlm.lowrank import LowRank
from mendlm.methods.base import Learned
from mendlm.recording import Gradient
from mendlm.text import Batch


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The editor network's shape. The paper's ablations are values of these fields."""

    layers: tuple[str, ...] = ()
    """Patterns of the layers to edit (see `mendlm.layers.select`); empty: the paper's choice for the architecture."""
    rank: int = 256
    """Rank of the networks' hidden products U V; the paper has 1920."""
    shared: bool = True
    """One network per weight shape, shared across layers; else one per layer."""
    normalize: bool = True
    """Zero mean and unit variance of the networks' inputs, by statistics over the training edits."""
    init: Literal["identity", "xavier"] = "identity"
    """Start of U: zeros, so that the network is the identity; or Xavier uniform."""
    inputs: Literal["both", "u", "delta", "smaller"] = "both"
    """What the networks see and change; the other factor passes through. `smaller`: whichever has fewer dimensions."""
    initial_rate: float = 5e-4
    """Where each layer's learned rate alpha starts."""
    normalizer_follows: bool = False
    """Let the statistics keep updating while editing, instead of freezing them after the first pass."""
    refine: int = 0
    """The most steps by which an edit that has not taken is refined (`mendlm.methods.refine`); none of it while training."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if self.refine < 0:
            raise InputError(f"refine is a number of steps, 0 for none, got {self.refine}")
        if not self.initial_rate > 0:
            raise InputError(f"initial_rate must be above 0, got {self.initial_rate}")


class Normalizer(nn.Module):
    """Running mean and variance per dimension, merged batch by batch (Chan, Golub and LeVeque, 1979).

    Its state, the count included, lives in buffers, so that it is saved and resumed.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    @torch.no_grad()
    def update(self, z: Float[Tensor, "*batch width"], counts: Bool[Tensor, "*batch"]) -> None:
        """Take in the rows that count."""
        weight = counts.unsqueeze(-1).to(z.dtype)
        lead = tuple(range(z.dim() - 1))
        new = weight.sum().double()
        mean = (z * weight).sum(lead) / new.clamp(min=1).to(z.dtype)
        squares = ((z - mean).square() * weight).sum(lead)
        total = (self.count + new).clamp(min=1)
        shift = mean - self.mean
        self.squares += squares + shift.square() * (self.count * new / total).to(z.dtype)
        self.mean += shift * (new / total).to(z.dtype)
        self.count += new

    @torch.no_grad()
    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in what other processes have counted; `total` sums a tensor over all of them."""
        count = total(self.count)
        mean = total(self.count * self.mean.double()) / count.clamp(min=1)
        squares = total(self.squares.double() + self.count * (self.mean.double() - mean).square())
        for own, merged in ((self.count, count), (self.mean, mean), (self.squares, squares)):
            own.copy_(merged)

    def forward(self, z: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """`(z - mean) / std`, with a floor of 1e-6 of the largest std. Before there are statistics, z itself."""
        std = (self.squares / (self.count - 1).clamp(min=1).to(z.dtype)).sqrt()
        floor = (1e-6 * std.max()).clamp(min=torch.finfo(z.dtype).tiny)
        return (z - self.mean).div_(torch.where(self.count > 1, std.clamp(min=floor), 1.0))


Rows = tuple[Callable[[], Tensor], Tensor]
"""What makes a layer's rows z (*batch, rows, width), a tensor of their own each time; and which count (*batch, rows)."""


def training_precision(base: torch.dtype) -> torch.dtype | None:
    """The dtype of the networks' matrix products in training, for a base in this one; None: that of their weights."""
    return torch.bfloat16 if base.itemsize < 4 else None


class EditorNet(nn.Module):
    """The paper's network `g` for `layers` layers of one shape: two low-rank residual blocks."""

    def __init__(self, width: int, layers: int, rank: int, init: Literal["identity", "xavier"]) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(2, width, rank))
        self.V = nn.Parameter(torch.empty(2, rank, width))
        self.b = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(2, layers, width))
        self.shift = nn.Parameter(torch.zeros(2, layers, width))
        for block in range(2):
            nn.init.xavier_uniform_(self.V[block])
            if init == "xavier":
                nn.init.xavier_uniform_(self.U[block])

    def forward(self, rows: Mapping[int, Rows], seen: slice, precision: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The rows of some layers, by number, with `g` in the dimensions that are `seen`; those that do not count are zeros.

        Differentiable in the network's parameters, not in the rows. Matrix products are taken in `precision`, by default z's.
        """
        parameters = self.U, self.V, self.b, self.scale, self.shift
        outputs: tuple[Tensor, ...] = _Blocks.apply(rows, seen, precision or self.b.dtype, *parameters)  # type: ignore[no-untyped-call]
        return outputs


class _Blocks(torch.autograd.Function):
    """`EditorNet`'s two blocks for some layers, and their gradient by hand, in far fewer passes over memory than autograd's."""

    @staticmethod
    def forward(
        ctx: Any, rows: Mapping[int, Rows], seen: slice, precision: torch.dtype, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.rows, ctx.seen, ctx.precision = rows, seen, precision
        ctx.save_for_backward(*parameters)
        products = _Products(parameters, precision)
        outputs = []
        for layer, (make, counts) in rows.items():
            z = make()
            part = z[..., seen]
            for block in range(2):
                part.add_(products(part, block, layer)[-1].clamp_(min=0))
            outputs.append(z.mul_(counts.unsqueeze(-1)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        U, V, b, scale, shift = found = [torch.zeros_like(parameter) for parameter in ctx.saved_tensors]
        products = _Products(ctx.saved_tensors, ctx.precision)
        for (layer, (make, counts)), slope in zip(ctx.rows.items(), slopes, strict=True):
            z = make()[..., ctx.seen].flatten(0, -2)
            slope = (slope * counts.unsqueeze(-1))[..., ctx.seen].flatten(0, -2)
            first = products(z, 0, layer)
            second = products(z + first[-1].clamp(min=0), 1, layer)
            for block, (low, hidden, inner, before) in ((1, second), (0, first)):
                through = slope * (before >= 0)  # 1 at 0, where all start: with relu's 0 nothing would ever move
                shift[block, layer] = through.sum(0)
                scale[block, layer] = inner.mul_(through).sum(0)
                through *= products.scale[block, layer]
                if block == 0:
                    b += through.sum(0)
                through = through.to(low)
                U[block].add_(through.mT @ hidden)
                through = through @ products.U[block]
                V[block].add_(through.mT @ low)
                if block == 1:
                    slope += through @ products.V[block]
        return None, None, None, *found


class _Products:
    """What a block makes of rows: themselves in `precision`, `V z`, `U V z + b`, and that with the layer's scale and shift."""

    def __init__(self, parameters: Sequence[Tensor], precision: torch.dtype) -> None:
        U, V, self.b, self.scale, self.shift = parameters
        self.U, self.V = U.to(precision), V.to(precision)

    def __call__(self, z: Float[Tensor, "*batch width"], block: int, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low = z.to(self.V)
        hidden = low @ self.V[block].mT
        inner = (hidden @ self.U[block].mT).to(z)
        if block == 0:
            inner += self.b
        return low, hidden, inner, torch.addcmul(self.shift[block, layer], self.scale[block, layer], inner)


class RowEditor(Learned):
    """A method whose network makes rows `u~`, `delta~` of a gradient's rows; what becomes of those is the method's."""

    config: NetworkConfig
    learning_rate = 1.5e-3
    works_apart = True

    def __init__(self, specs: Sequence[LayerSpec], config: NetworkConfig) -> None:
        super().__init__(specs, config)
        groups: dict[str, list[LayerSpec]] = {}
        for number, spec in enumerate(self.specs):
            groups.setdefault(f"{spec.d_out}x{spec.d_in}" if self.config.shared else f"layer{number}", []).append(spec)
        self._groups = groups
        """Network -> its layers, by number."""
        self.nets = nn.ModuleDict()
        self.normalizers = nn.ModuleDict()
        for key, group in groups.items():
            first, last = self._seen(group[0])
            self.nets[key] = EditorNet(last - first, len(group), self.config.rank, self.config.init)
            self.normalizers[key] = Normalizer(group[0].d_in + group[0].d_out)
        self.log_rates = nn.Parameter(torch.full((len(self.specs),), math.log(self.config.initial_rate)))

    @classmethod
    def rank_within(cls, specs: Sequence[LayerSpec], config: NetworkConfig, parameters: int) -> int:
        """The largest rank with which an editor has at most so many parameters; 0 if it has more with rank 1.

        Their number is a straight line in the rank, here drawn through two editors of shapes alone.
        """
        with torch.device("meta"):
            one, two = (sum(p.numel() for p in cls(specs, replace(config, rank=rank)).parameters()) for rank in (1, 2))
        return max(0, 1 + (parameters - one) // (two - one))

    @property
    def follows_along(self) -> bool:
        """Whether the normaliser keeps updating while editing."""
        return self.config.normalizer_follows

    @property
    def refine(self) -> int:
        """The most steps by which an edit that has not taken is refined."""
        return self.config.refine

    def rates(self) -> list[nn.Parameter]:
        """The logarithm of each layer's learned rate alpha."""
        return [self.log_rates]

    def _seen(self, spec: LayerSpec) -> tuple[int, int]:
        """The slice of z that the network sees and changes."""
        which = self.config.inputs
        if which == "smaller":
            which = "u" if spec.d_in <= spec.d_out else "delta"
        return {"both": (0, spec.d_in + spec.d_out), "u": (0, spec.d_in), "delta": (spec.d_in, spec.d_in + spec.d_out)}[which]

    def _raw(self, rows: LowRank) -> Tensor:
        """A layer's rows z (*batch, rows, width) before they are normalised, a tensor of their own."""
        rows = rows.to(self.log_rates.device)
        return torch.cat([rows.u, rows.delta], -1).to(self.log_rates)

    def _normed(self, normalizer: nn.Module, rows: LowRank) -> Tensor:
        z = self._raw(rows)
        return normalizer(z) if self.config.normalize else z

    def edit(self, model: Any, batch: Batch) -> Edit:
        """One edit for each example; where the statistics follow along, they take in these requests first."""
        if self.config.normalizer_follows:
            self.prepare(model, batch)
        return super().edit(model, batch)

    def prepare(self, model: Any, batch: Batch) -> None:
        """Take the requests' rows into the statistics."""
        self.fit_normalizer(self.gradient(model, batch))

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Merge the statistics of all processes."""
        for normalizer in self.normalizers.values():
            assert isinstance(normalizer, Normalizer)
            normalizer.merge(total)

    def fit_normalizer(self, gradient: Gradient) -> None:
        """Take the gradient's rows into the statistics."""
        for key, group in self._groups.items():
            normalizer = self.normalizers[key]
            assert isinstance(normalizer, Normalizer)
            for spec in group:
                rows = gradient[spec.name]
                normalizer.update(self._raw(rows), rows.nonzero().to(self.log_rates.device))

    def changed(self, gradient: Gradient) -> dict[str, LowRank]:
        """`u~` and `-alpha * delta~` of each layer's rows, on their device; those that do not count are zeros."""
        made: dict[str, Tensor] = {}
        for key, group in self._groups.items():
            rows: dict[int, Rows] = {}
            for number, spec in enumerate(group):
                raw = gradient[spec.name]
                make = functools.partial(self._normed, self.normalizers[key], raw)
                rows[number] = make, raw.nonzero().to(self.log_rates.device)
            precision = training_precision(gradient[group[0].name].u.dtype) if torch.is_grad_enabled() else None
            outputs = self.nets[key](rows, slice(*self._seen(group[0])), precision)
            made |= zip((spec.name for spec in group), outputs, strict=True)
        changed = {}
        for spec, rate in zip(self.specs, self.log_rates.exp(), strict=True):
            u, delta = torch.split(made[spec.name], [spec.d_in, spec.d_out], -1)
            changed[spec.name] = LowRank(u, delta * -rate).to(gradient[spec.name].u.device)
        return changed
