from __future__ import annotations

from math import e
from typing import Any

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
        ("", "?", False),
        (" ?", "?", True),
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
        ("2.5 km", "2", False),
        ("2,350", "2", False),
        ("2. It", "2", True),
        ("Lyo", "Lyon", False),
        ("", "Lyon", False),
    ],
)
def test_continues_at_a_word_boundary(generated: str, target: str, expected: bool) -> None:
    assert metrics.continues(generated, target) is expected


def test_the_interval_of_the_score_is_over_edits_that_have_all_three() -> None:
    def row(*after: bool | None) -> dict[str, Any]:
        return {"new_over_old": {w: [[False, x]] for w, x in zip(metrics.RIVALS.values(), after, strict=True) if x is not None}}

    rows = [row(True, True, True), row(True, False, True)] * 10
    low, high = metrics._score_interval([*rows, row(True, None, None)], 0)
    assert low is not None
    assert high is not None
    assert 0.4 < low < 0.75 < high < 1
    assert metrics._score_interval([row(True, None, True), {}], 0) == (None, None)


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


def test_the_interval_of_a_statistic_is_over_units_not_over_what_they_hold() -> None:
    values = [0.1, 0.5, 0.9, 0.2, 0.7]
    assert metrics.interval(values, lambda some: sum(some) / len(some), seed=3) == metrics.bootstrap(values, seed=3)
    units = [(3.0, 6), (1.0, 2), (50.0, 100)]  # every one has the ratio 1/2, so that no resample has another
    assert metrics.interval(units, lambda some: sum(a for a, _ in some) / sum(b for _, b in some)) == (0.5, 0.5)
    assert metrics.interval([], lambda some: 1.0) == (None, None)


def row(success: tuple[bool, bool], lost: tuple[bool, bool], **more: Any) -> dict[str, Any]:
    """A result whose two unrelated answers are right before; `lost` says which the edit makes wrong."""
    watched = [
        {
            "kind": kind,
            "kept": not gone,
            "answered": True,
            "right": (True, not gone),
            "nll": (1.0, 2.0),
            "kl": 0.5 + gone,
            "tokens": 3,
        }
        for kind, gone in zip(("Forgetfulness", None), lost, strict=True)
    ]
    return {
        "success": success,
        "token_accuracy": success,
        "generality": [success],
        "portability": [],
        "norm": {},
        "locality": watched,
    } | more


def test_targets_given_before_are_counted_apart() -> None:
    rows = (
        [row((True, True), (False, False))] * 3
        + [row((False, True), (False, False), generality=[(False, True), (False, False), (True, True)])]
        + [row((False, False), (False, False))] * 3
    )
    summary = metrics.summarise(rows)
    assert (summary["edit_success_of_new"]["before"], summary["edit_success_of_new"]["after"]) == (1 / 16, 3 / 16)
    assert (summary["already_given"], summary["success"]["after"]) == (3, 4 / 7)
    assert (summary["success_of_new"]["before"], summary["success_of_new"]["after"]) == (0, 1 / 4)


def test_what_unrelated_texts_lose() -> None:
    rows = [row((False, True), (True, False)), row((False, True), (False, False)), row((False, True), (True, True))]
    summary = metrics.summarise(rows)
    accuracy = summary["unrelated_accuracy"]
    assert (accuracy["before"], accuracy["after"]) == (1, 0.5)
    assert summary["drawdown_acc"] == 0.5
    low, high = summary["drawdown_acc_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert (1 - low, 1 - high) == pytest.approx((accuracy["high"], accuracy["low"]))
    assert (summary["locality"]["after"], summary["locality_by_kind"]["Forgetfulness"]["after"]) == (0.5, pytest.approx(1 / 3))
    assert list(summary["locality_by_kind"]) == ["Forgetfulness"]
    assert summary["unrelated_kl"] == pytest.approx(1.0)
    assert summary["perplexity"] == pytest.approx({"before": e, "after": e**2, "low": e**2, "high": e**2})
    assert summary["drawdown_ppl_interval"] == pytest.approx([e**2 - e] * 2)
    read = [one | {"prose": {"nll": (0.0, 1.0), "kl": 4.0, "tokens": 5}} for one in rows]
    summary = metrics.summarise(read)
    assert summary["drawdown_ppl"] == pytest.approx(e - 1)
    assert summary["unrelated_kl"] == pytest.approx((6 * 1.0 + 3 * 4.0) / 9)
    bare = metrics.summarise([one | {"locality": []} for one in read])  # running text alone
    assert (bare["unrelated_kl"], bare["drawdown_acc"], bare["drawdown_acc_interval"]) == (4.0, None, [None, None])


def test_edits_in_turn_are_told_apart_by_when_they_were_made() -> None:
    made = [row((False, turn > 0), (False, False), turn=turn, success_when_made=(False, True)) for turn in range(3)]
    summary = metrics.summarise(made)
    assert [summary[f"success_{of}"]["after"] for of in ("when_made", "of_earlier", "of_later")] == [1, 0, 1]
    assert "success_when_made" not in metrics.summarise([row((False, True), (False, False))])
