from __future__ import annotations

import pytest

from mendlm import metrics


def test_mean_of_nothing_is_none() -> None:
    assert metrics.mean([]) is None
    assert metrics.mean([1.0, 2.0, 6.0]) == 3.0


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2),  # ceil(0.5 * 4) = 2nd smallest
        ([5.0, 1.0, 3.0], 0.5, 3),
        ([float(i) for i in range(1, 21)], 0.95, 19),  # ceil(0.95 * 20) = 19th smallest
        ([float(i) for i in range(1, 22)], 0.95, 20),
        ([7.0], 0.5, 7),
        ([2.0, 1.0], 0.0, 1),
        ([2.0, 1.0], 1.0, 2),
        ([], 0.5, None),
    ],
)
def test_percentile_by_nearest_rank(values: list[float], share: float, expected: float | None) -> None:
    assert metrics.percentile(values, share) == expected


def test_bootstrap_covers_the_mean_and_narrows_with_more_values() -> None:
    low, high = metrics.bootstrap([0.0, 1.0] * 50)
    wide_low, wide_high = metrics.bootstrap([0.0, 1.0] * 5)
    # 1.96 * sqrt(0.25 / 100) = 0.098
    assert low == pytest.approx(0.5 - 0.098, abs=0.025)
    assert high == pytest.approx(0.5 + 0.098, abs=0.025)
    assert wide_low < low < 0.5 < high < wide_high


def test_bootstrap_of_equal_values_and_of_nothing() -> None:
    assert metrics.bootstrap([0.25] * 7) == (0.25, 0.25)
    assert metrics.bootstrap([]) == (None, None)


def test_bootstrap_depends_on_its_seed_alone() -> None:
    values = [0.1, 0.5, 0.9, 0.2, 0.7]
    assert metrics.bootstrap(values, seed=3) == metrics.bootstrap(values, seed=3)
    assert len({metrics.bootstrap(values, seed=seed) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("generated", "target", "expected"),
    [
        (" Lyon", "Lyon", True),
        ("Lyon.\n", " Lyon", True),
        ("Lyon!?", "Lyon.", True),
        ("Lyon .", "Lyon", True),
        ("Lyon is nice", "Lyon", False),
        ("lyon", "Lyon", False),
        ("Lyo", "Lyon", False),
        ("", "Lyon", False),
        ("St. Louis", "St. Louis", True),
    ],
)
def test_answers(generated: str, target: str, expected: bool) -> None:
    assert metrics.answers(generated, target) is expected


@pytest.mark.parametrize(
    ("generated", "target", "expected"),
    [
        (" Lyon, in the south", "Lyon", True),
        ("Lyon", " Lyon", True),
        ("\nLyon\n", "Lyon", True),
        ("Lyonnaise", "Lyon", False),
        ("Lyon2", "Lyon", False),
        ("U.S.A", "U.S.", True),
        ("in Lyon", "Lyon", False),
        ("Lyo", "Lyon", False),
        ("", "Lyon", False),
    ],
)
def test_continues_at_a_word_boundary(generated: str, target: str, expected: bool) -> None:
    assert metrics.continues(generated, target) is expected


@pytest.mark.parametrize(
    ("text", "target", "found"),
    [
        ("It is Lyon, of course", "Lyon", True),
        ("in LYON.", " Lyon.", True),
        ("Lyonnaise", "Lyon", False),
        ("a+b is c", "a+b", True),
        ("", "Lyon", False),
    ],
)
def test_contains_finds_a_target_between_word_boundaries_in_any_case(text: str, target: str, found: bool) -> None:
    assert metrics.contains(text, target) is found


def test_the_harmonic_mean() -> None:
    assert metrics.harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert metrics.harmonic_mean([1.0, 0.0]) == 0.0
    assert metrics.harmonic_mean([1.0, None]) is None
    assert metrics.harmonic_mean([]) is None
