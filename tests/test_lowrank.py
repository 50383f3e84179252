import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mendlm.errors import InputError
from mendlm.lowrank import LowRank, concatenate, stack


def make(shape: tuple[int, ...], d_out: int, d_in: int, rng: torch.Generator) -> LowRank:
    u = torch.randn(*shape, d_in, generator=rng, dtype=torch.float64)
    return LowRank(u, torch.randn(*shape, d_out, generator=rng, dtype=torch.float64))


@st.composite
def pairs(draw) -> tuple[LowRank, LowRank]:
    """Two updates of one matrix, with equal batches and rows of their own."""
    size = st.integers(1, 6)
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    d_out, d_in, rng = draw(size), draw(size), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return make((*batch, draw(size)), d_out, d_in, rng), make((*batch, draw(size)), d_out, d_in, rng)


@given(pairs(), st.floats(-3, 3))
def test_algebra_is_that_of_the_dense_matrices(both, factor):
    a, b = both
    assert_close((a + b).dense(), a.dense() + b.dense())
    assert (a + b).rows == a.rows + b.rows
    assert_close((a * factor).dense(), a.dense() * factor)
    assert_close((factor * a).dense(), a.dense() * factor)
    assert_close((-a).dense(), -a.dense())
    assert a.dense().shape == (*a.batch, *a.shape)


@given(pairs())
def test_dot_norm_and_cosine_are_frobenius(both):
    a, b = both
    flat_a, flat_b = a.dense().flatten(-2), b.dense().flatten(-2)
    assert_close(a.dot(b), (flat_a * flat_b).sum(-1))
    assert_close(a.norm(), flat_a.norm(dim=-1))
    assert_close(a.cosine(b), torch.cosine_similarity(flat_a, flat_b, dim=-1))


def test_cosine_with_a_zero_matrix_is_zero():
    a = make((2, 3), 4, 5, torch.Generator().manual_seed(0))
    assert_close(a.cosine(a * 0.0), torch.zeros(2, dtype=torch.float64))


@given(pairs(), st.integers(1, 4))
def test_products_with_columns_and_rows(both, n):
    a, _ = both
    x = torch.randn(*a.batch, a.shape[1], n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert_close(a @ x, a.dense() @ x)
    assert_close(a.apply(x.mT), (a.dense() @ x).mT)


@given(pairs(), st.integers(1, 8))
def test_compress_is_the_truncated_svd(both, rank):
    a = both[0]
    small, lost = a.compress(rank)
    left, values, right = torch.linalg.svd(a.dense(), full_matrices=False)
    best = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    assert_close(small.dense(), best, atol=1e-10, rtol=1e-8)
    assert_close(lost, values[..., rank:].norm(dim=-1) / values.norm(dim=-1), atol=1e-7, rtol=1e-7)
    assert small.rows <= rank


def test_compressed_rows_are_balanced_and_in_order():
    small, _ = make((6,), 7, 8, torch.Generator().manual_seed(1)).compress(4)
    values = torch.linalg.svdvals(small.dense())[:4]
    assert_close(small.u.norm(dim=-1), values.sqrt())
    assert_close(small.delta.norm(dim=-1), values.sqrt())


def test_compress_of_float_rows_keeps_the_small_singular_values():
    rng = torch.Generator().manual_seed(2)
    scales = torch.tensor([1e3, 1.0, 1e-3])
    a = LowRank(torch.randn(3, 20, generator=rng), torch.randn(3, 30, generator=rng) * scales[:, None])
    small, lost = a.compress(3)
    exact = torch.linalg.svdvals(a.to(torch.float64).dense())[:3]
    assert small.u.dtype == torch.float32
    assert_close((small.u.norm(dim=-1) * small.delta.norm(dim=-1)).double(), exact, rtol=1e-5, atol=0)
    assert lost < 1e-9


def test_compress_of_zero_loses_nothing():
    small, lost = LowRank(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)).compress(2)
    assert not small.dense().any()
    assert not lost.any()


@given(pairs(), st.integers(0, 3))
def test_padding_adds_nothing(both, extra):
    a = both[0]
    padded = a.pad(a.rows + extra)
    assert padded.rows == a.rows + extra
    assert_close(padded.dense(), a.dense())


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_grouped_sums_consecutive_matrices(groups, size, rows):
    a = make((groups * size, rows), 4, 5, torch.Generator().manual_seed(rows))
    assert_close(a.grouped(size).dense(), a.dense().reshape(groups, size, 4, 5).sum(1))


def test_stack_concatenate_and_selection():
    rng = torch.Generator().manual_seed(3)
    singles = [make((rows,), 4, 5, rng) for rows in (1, 3, 2)]
    batch = stack(singles)
    assert_close(batch.dense(), torch.stack([single.dense() for single in singles]))
    other = make((2, 5), 4, 5, rng)
    assert_close(concatenate([batch, other]).dense(), torch.cat([batch.dense(), other.dense()]))
    for index in (1, slice(1, 3), torch.tensor([2, 0, 2])):
        assert_close(batch[index].dense(), batch.dense()[index])


@given(pairs())
def test_fewest_is_the_same_matrix_in_no_more_rows_than_it_has(both):
    a = both[0] + both[1]
    assert_close(a.fewest().dense(), a.dense())
    assert a.fewest().rows == min(a.rows, *a.shape)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 3, 5), (2, 5, 3)])
def test_from_dense_conversion_and_detach(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
    a = LowRank.from_dense(matrix)
    assert torch.equal(a.dense(), matrix)
    varies, identity = (a.delta, a.u) if shape[-1] <= shape[-2] else (a.u, a.delta)
    assert varies.requires_grad
    assert torch.equal(identity, torch.eye(a.rows).expand_as(identity))
    assert not any(factor.requires_grad for factor in (a.detach().u, a.detach().delta))
    assert a.to(torch.bfloat16).u.dtype == torch.bfloat16
    assert (a.rows, a.shape) == (min(shape[-2:]), shape[-2:])
    assert a.nbytes == 4 * (a.u.numel() + a.delta.numel())


def test_a_tensor_scales_each_matrix_of_a_batch():
    a = make((3, 2), 4, 5, torch.Generator().manual_seed(5))
    factor = torch.tensor([0.0, 1.0, -2.0]).double()[:, None, None]
    assert_close((a * factor).dense(), a.dense() * factor)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_isfinite(bad):
    a = make((2,), 3, 4, torch.Generator().manual_seed(6))
    assert a.isfinite()
    assert not (a * bad).isfinite()
    assert not LowRank(a.u * bad, a.delta).isfinite()


def test_errors_name_what_was_given(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    a = make((4, 2), 3, 5, torch.Generator().manual_seed(7))
    with pytest.raises(InputError, match=r"\(4, 2, 5\).*\(4, 3, 3\)"):
        LowRank(a.u, a.delta[:, :1].expand(4, 3, 3))
    with pytest.raises(InputError, match="got 0"):
        a.compress(0)
    with pytest.raises(InputError, match="2 rows to 1"):
        a.pad(1)
    with pytest.raises(InputError, match="groups of 3"):
        a.grouped(3)
    with pytest.raises(InputError, match="groups of 2"):
        a[0].grouped(2)
