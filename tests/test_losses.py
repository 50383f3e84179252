import math

import pytest
import torch

import cases
import oracles
from mendlm import losses

ROW = torch.tensor([2, 0, 2, 2, 0])  # three examples, the second without a scored position
LABEL = torch.tensor([1, 6, 0, 3, 3])


def logits(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=cases.generator(seed), dtype=torch.float64)).to(dtype)


def logs(row: torch.Tensor) -> list[float]:
    whole = math.log(sum(math.exp(x) for x in row.tolist()))
    return [x - whole for x in row.tolist()]


def means(values: list[float]) -> list[float]:
    mine = [[value for value, row in zip(values, ROW.tolist(), strict=True) if row == i] for i in range(3)]
    return [sum(some) / len(some) if some else 0.0 for some in mine]


def test_token_nll_is_the_mean_over_each_examples_targets():
    given = logits(0, 5, 7)
    expected = means([-logs(row)[label] for row, label in zip(given, LABEL.tolist(), strict=True)])
    assert losses.token_nll(given, LABEL, ROW, 3).tolist() == pytest.approx(expected, rel=1e-12)
    sums = [count * mean for count, mean in zip(ROW.bincount(minlength=3).tolist(), expected, strict=True)]
    assert losses.token_nll(given, LABEL, ROW, 3, whole=True).tolist() == pytest.approx(sums, rel=1e-12)


def test_token_kl_is_the_mean_over_each_examples_positions():
    base, edited = logits(1, 5, 7), logits(2, 5, 7)
    expected = means([oracles.kl(logs(p), logs(q)) for p, q in zip(base, edited, strict=True)])
    assert losses.token_kl(base, edited, ROW, 3).tolist() == pytest.approx(expected, rel=1e-12)
    assert losses.token_kl(base, base, ROW, 3).tolist() == [0, 0, 0]
    bent = means([0.5 * math.log(1 + oracles.kl(logs(p), logs(q)) / 0.5) for p, q in zip(base, edited, strict=True)])
    assert losses.token_kl(base, edited, ROW, 3, scale=0.5).tolist() == pytest.approx(bent, rel=1e-12)


@pytest.mark.parametrize(("given", "result"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_results_are_float32_or_better(given, result):
    x, y = logits(5, 5, 7, dtype=given), logits(6, 5, 7, dtype=given)
    some = losses.token_nll(x, LABEL, ROW, 3), losses.token_kl(x, y, ROW, 3)
    assert {value.dtype for value in some} == {result}
    exact = losses.token_nll(x.double(), LABEL, ROW, 3)
    torch.testing.assert_close(some[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_all_by_row_holds_for_an_example_without_any():
    flags = torch.tensor([True, True, False, True, True])
    assert losses.all_by_row(flags, ROW, 3).tolist() == [True, True, False]


def test_no_scored_position_at_all():
    nothing = torch.zeros(0, dtype=torch.long)
    assert losses.token_nll(torch.zeros(0, 7), nothing, nothing, 2).tolist() == [0, 0]
    assert losses.all_by_row(nothing.bool(), nothing, 2).tolist() == [True, True]
