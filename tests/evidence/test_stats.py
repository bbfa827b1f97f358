"""Paired statistics against numbers worked out by hand."""

import math

import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.evidence.claims import Claim
from dyncomp.evidence.stats import Estimate, difference, estimate, holds


def claim(**changes):
    base = dict(id="x", text="t", paper="p", metric="q", arm="a", against="b")
    base |= dict(relation="<", margin=0.0, kind="compute")
    return Claim(**{**base, **changes})


def test_interval_by_hand():
    # 1, 2, 3: mean 2, s = 1; t(0.975, 2) = 4.302653 from the tables
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.interval == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )
    # 5 numbers, s^2 = 2.5; t(0.975, 4) = 2.776445
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found.interval == pytest.approx((3 - half, 3 + half))


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert estimate([4.0]) == Estimate(4.0, None, 1)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(DyncompError):
            estimate(bad)


@pytest.mark.parametrize(
    "relation, margin, expected",
    [
        ("<", 2.0, True), ("<", 1.0, "unresolved"), ("<", 0.0, False), ("<", 0.5, False),
        ("<=", 1.5, True), ("<", 1.5, "unresolved"), ("<=", 0.4, False),
        (">", 0.4, True), (">", 1.0, "unresolved"), (">", 1.5, False), (">=", 1.5, "unresolved"),
        (">=", 0.5, True), (">", 0.5, "unresolved"), (">=", 1.6, False), ("report", 9.0, None),
    ],
)  # fmt: skip
def test_holds(relation, margin, expected):
    assert holds(relation, margin, Estimate(1.0, (0.5, 1.5), 3), 3) == expected


def test_too_few_seeds_resolve_nothing():
    assert holds("<", 9.0, Estimate(1.0, (0.5, 1.5), 4), 5) == "unresolved"
    assert holds("<", 9.0, Estimate(1.0, None, 1), 1) == "unresolved"


def test_no_spread_at_the_margin():
    flat = Estimate(0.0, (0.0, 0.0), 3)
    assert holds("<=", 0.0, flat, 3) is True and holds("<", 0.0, flat, 3) is False


FIGURES = {
    "a": {"q": 5.0, "c": 1.5}, "b": {"q": 2.0, "c": 1.0}, "d": {"q": 4.0, "c": 3.0},
    "e": {"q": 4.0, "c": 1.0},
}  # fmt: skip


def test_differences():
    assert difference(claim(), FIGURES) == 3.0
    assert difference(claim(against="zero"), FIGURES) == 5.0
    # line through (1, 2) and (3, 4) is 2.5 at 1.5
    assert difference(claim(against="line:b,d"), FIGURES, "c") == 2.5
    assert difference(claim(against="line:b,d", compute="c"), FIGURES) == 2.5
    # steps 5 -> 2 -> 4 are -3 and +2: the worst for falling is +2, for rising -3
    assert difference(claim(against="trend:b,d"), FIGURES) == 2.0
    assert difference(claim(against="trend:b,d", relation=">="), FIGURES) == -3.0


def test_differences_that_cannot_be_formed():
    with pytest.raises(DyncompError, match="needs 'q' of arm 'z'"):
        difference(claim(against="z"), FIGURES)
    with pytest.raises(DyncompError, match="both arms of the line have c = 1"):
        difference(claim(against="line:b,e"), FIGURES, "c")
