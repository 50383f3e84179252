"""`LowRank`: rows that stand for a matrix, and the algebra on them.

A linear layer `y = W x` has, for each token, the weight gradient `delta u^T` (`u` the input, `delta` the gradient at the
output). So a sum over tokens is `delta.mT @ u` with one row a token, and nearly every editing method's update has this form.

Knows nothing of models, layers or files.

Legend: `u` (*batch, rows, d_in), `delta` (*batch, rows, d_out); the matrix meant is (*batch, d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mendlm.errors import InputError


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix `delta.mT @ u`, held as rows.

    `u`: (*batch, rows, d_in) and `delta`: (*batch, rows, d_out). A row of zeros adds nothing, so padding is exact.
    """

    u: Float[Tensor, "*batch rows d_in"]
    delta: Float[Tensor, "*batch rows d_out"]

    def __post_init__(self) -> None:
        if self.u.shape[:-1] != self.delta.shape[:-1]:
            raise InputError(
                f"u {tuple(self.u.shape)} and delta {tuple(self.delta.shape)} must agree in all but the last dimension"
            )

    @classmethod
    def from_dense(cls, matrix: Float[Tensor, "*batch d_out d_in"]) -> LowRank:
        """A dense matrix as rows: the smaller factor is the identity (`u`, where both are alike). Exact, only larger."""
        d_out, d_in = matrix.shape[-2:]
        eye = torch.eye(min(d_out, d_in), dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], -1, -1)
        return cls(eye, matrix.mT) if d_in <= d_out else cls(matrix, eye)

    @property
    def rows(self) -> int:
        """How many rows; the rank is at most this."""
        return self.u.shape[-2]

    @property
    def batch(self) -> tuple[int, ...]:
        """The leading axes; `()` for a single matrix."""
        return tuple(self.u.shape[:-2])

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_out, d_in)` of the matrix."""
        return self.delta.shape[-1], self.u.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take."""
        return self.u.nbytes + self.delta.nbytes

    def dense(self) -> Float[Tensor, "*batch d_out d_in"]:
        """The matrix itself. Costs d_out * d_in memory: for tests, merging and small models."""
        return self.delta.mT @ self.u

    def __matmul__(self, x: Float[Tensor, "*_ d_in n"]) -> Float[Tensor, "*_ d_out n"]:
        """`dense() @ x` for columns `x`, without the dense matrix."""
        return self.delta.mT @ (self.u @ x)

    def apply(self, x: Float[Tensor, "*_ tokens d_in"]) -> Float[Tensor, "*_ tokens d_out"]:
        """`x @ dense().mT`: what a layer's output gains for inputs `x` held as rows."""
        return (x @ self.u.mT) @ self.delta

    def __add__(self, other: LowRank) -> LowRank:
        """The sum of the matrices: the rows of both."""
        return total([self, other])

    def __mul__(self, factor: float | Tensor) -> LowRank:
        """The matrix times a number."""
        return LowRank(self.u, self.delta * factor)

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __getitem__(self, index: int | slice | Tensor) -> LowRank:
        """Select along the first batch axis."""
        assert self.batch, "a single matrix has no batch axis to select from"
        return LowRank(self.u[index], self.delta[index])

    def to(self, target: torch.device | torch.dtype | str) -> LowRank:
        """Both factors on another device or in another dtype."""
        return LowRank(self.u.to(target), self.delta.to(target))

    def detach(self) -> LowRank:
        """The same rows outside any graph."""
        return LowRank(self.u.detach(), self.delta.detach())

    def nonzero(self) -> Bool[Tensor, "*batch rows"]:
        """Which rows add something: neither factor all zero."""
        return (self.u != 0).any(-1) & (self.delta != 0).any(-1)

    def isfinite(self) -> Bool[Tensor, ""]:
        """Whether every number is finite; nothing waits for the answer."""
        return self.u.isfinite().all() & self.delta.isfinite().all()

    def dot(self, other: LowRank) -> Float[Tensor, "*batch"]:
        """The Frobenius inner product, from the rows' Gram matrices: `<D'U, E'V> = sum((D E') * (U V'))`."""
        return ((self.delta @ other.delta.mT) * (self.u @ other.u.mT)).sum((-2, -1))

    def norm(self) -> Float[Tensor, "*batch"]:
        """The Frobenius norm, without the dense matrix."""
        return self.dot(self).clamp(min=0).sqrt()

    def cosine(self, other: LowRank) -> Float[Tensor, "*batch"]:
        """The cosine between two matrices as vectors; 0 where one is zero."""
        scale = self.norm() * other.norm()
        return torch.where(scale > 0, self.dot(other) / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0)

    def compress(self, rank: int) -> tuple[LowRank, Float[Tensor, "*batch"]]:
        """The best approximation of the given rank (Eckart-Young), and the share of the norm that it loses (0 to 1).

        Two thin QRs and the SVD of a (rows, rows) core: `delta.mT @ u = Qd (Rd Ru.mT) Qu.mT`. Computed in float64.
        The rows are ordered by singular value, each side carrying its square root.
        """
        if rank < 1:
            raise InputError(f"rank must be at least 1, got {rank}")
        qu, ru = torch.linalg.qr(self.u.double().mT)
        qd, rd = torch.linalg.qr(self.delta.double().mT)
        left, values, right = torch.linalg.svd(rd @ ru.mT, full_matrices=False)
        kept = values[..., :rank]
        root = kept.sqrt().unsqueeze(-1)
        small = LowRank(root * (qu @ right.mT[..., :rank]).mT, root * (qd @ left[..., :rank]).mT)
        total = values.square().sum(-1)
        lost = (values[..., rank:].square().sum(-1) / total.clamp(min=torch.finfo(total.dtype).tiny)).sqrt()
        return small.to(self.u.dtype), lost

    def pad(self, rows: int) -> LowRank:
        """The same matrix with zero rows appended up to `rows`."""
        extra = rows - self.rows
        if extra < 0:
            raise InputError(f"cannot pad {self.rows} rows to {rows}; compress instead")
        pad = torch.nn.functional.pad
        return self if extra == 0 else LowRank(pad(self.u, (0, 0, 0, extra)), pad(self.delta, (0, 0, 0, extra)))

    def fewest(self) -> LowRank:
        """The same matrix, within rounding, in no more rows than its smaller side: where there are more, as a dense one."""
        return self if self.rows <= min(self.shape) else LowRank.from_dense(self.dense())

    def grouped(self, size: int) -> LowRank:
        """Sum each `size` consecutive matrices of a batch: (batch, rows, d) becomes (batch / size, size * rows, d)."""
        if len(self.batch) != 1 or self.batch[0] % size:
            raise InputError(f"a batch {self.batch} cannot be summed in groups of {size}")
        groups = self.batch[0] // size
        return LowRank(self.u.reshape(groups, -1, self.u.shape[-1]), self.delta.reshape(groups, -1, self.delta.shape[-1]))


def total(matrices: Sequence[LowRank]) -> LowRank:
    """The sum of matrices: the rows of all, in their order."""
    return LowRank(torch.cat([m.u for m in matrices], -2), torch.cat([m.delta for m in matrices], -2))


def stack(matrices: Sequence[LowRank]) -> LowRank:
    """Single matrices as one batch (len, rows, d), padded with zero rows to the longest."""
    rows = max(matrix.rows for matrix in matrices)
    padded = [matrix.pad(rows) for matrix in matrices]
    return LowRank(torch.stack([m.u for m in padded]), torch.stack([m.delta for m in padded]))


def concatenate(batches: Sequence[LowRank]) -> LowRank:
    """Batches of matrices as one longer batch, padded with zero rows to the longest."""
    rows = max(batch.rows for batch in batches)
    padded = [batch.pad(rows) for batch in batches]
    return LowRank(torch.cat([b.u for b in padded]), torch.cat([b.delta for b in padded]))
