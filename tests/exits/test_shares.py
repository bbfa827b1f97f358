"""Thresholds by exit share: exact counts, ties, and the swept shares against hand-computed ones."""

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits.budgets import leaves_at
from dyncomp.exits.shares import SWEEP, share_thresholds, swept_shares


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("short", ["take", "official"])
def test_distinct_scores_give_exact_counts(seed, short):
    rng = np.random.default_rng(seed)
    scores, shares = rng.random((37, 3)), rng.dirichlet(np.ones(4))
    shares[seed % 3] = 0.0 if seed % 2 else shares[seed % 3]
    shares /= shares.sum()
    found = share_thresholds(scores, shares, short=short)
    left = np.bincount(leaves_at(scores, found), minlength=4)
    wanted = [int(37 * q) for q in shares[:3]]
    assert left.tolist() == [*wanted, 37 - sum(wanted)] and 0 <= left[3] - 37 * shares[3] <= 3
    # Who leaves is surer than who stays, among those that had not left.
    exits = leaves_at(scores, found)
    for k in range(3):
        here, later = scores[exits == k, k], scores[exits > k, k]
        assert not len(here) or not len(later) or here.min() > later.max()
    assert all(np.isinf(t) == (n == 0) for t, n in zip(found, wanted, strict=True))


def test_ties_leave_together_and_may_leave_too_few():
    """Four of six are certain at exit 1: they all go, and exit 2 finds two where it wants three."""
    scores = np.asarray([[1.0, 0.9], [1.0, 0.8], [1.0, 0.7], [1.0, 0.6], [0.5, 0.4], [0.3, 0.2]])
    shares = np.asarray([1 / 6, 1 / 2, 1 / 3])
    taken = share_thresholds(scores, shares)
    np.testing.assert_array_equal(taken, [1.0, 0.2])
    assert leaves_at(scores, taken).tolist() == [0, 0, 0, 0, 1, 1]
    official = share_thresholds(scores, shares, short="official")
    np.testing.assert_array_equal(official, [1.0, np.inf])
    assert leaves_at(scores, official).tolist() == [0, 0, 0, 0, 2, 2]
    everyone = share_thresholds(np.ones((4, 2)), np.asarray([0.5, 0.25, 0.25]))
    np.testing.assert_array_equal(everyone, [1.0, np.inf])  # nobody is left to set the second


def test_shares_of_the_sweep_by_hand():
    assert len(SWEEP) == 33 and SWEEP[0] == 0.2 and SWEEP[-1] == 4.0 and SWEEP.count(1.0) == 2
    np.testing.assert_allclose(swept_shares(1.0, 4), [0.2125, 0.2625, 0.13125, 0.39375])
    # p = 2: 2, 4, 8, 16 of 30; 0.85 x 2/30, the rest of 28/30 grown by g; then half of the third.
    first = 0.85 * 2 / 30
    grown = (1 - first) / (28 / 30)
    second, third = grown * 4 / 30, grown * 8 / 60
    wanted = [first, second, third, 1 - first - second - third]
    np.testing.assert_allclose(swept_shares(2.0, 4), wanted)
    np.testing.assert_allclose(swept_shares(1.0, 2), [0.425, 0.575])
    for p in SWEEP:
        assert abs(swept_shares(p, 4).sum() - 1) < 1e-12


def test_cost_never_falls_when_a_threshold_rises():
    rng = np.random.default_rng(0)
    scores, costs = rng.random((60, 3)), np.asarray([0.3, 0.5, 0.9, 1.0])
    for _ in range(50):
        low = rng.random(3)
        high = low + rng.random(3) * (np.arange(3) == rng.integers(3))
        spent = [costs[leaves_at(scores, t)].mean() for t in (low, high)]
        assert spent[0] <= spent[1]


def test_what_is_no_distribution_is_refused():
    with pytest.raises(DyncompError, match="sum to 1"):
        share_thresholds(np.ones((3, 1)), np.asarray([0.2, 0.2]))
    with pytest.raises(DyncompError, match="need 2 shares"):
        share_thresholds(np.ones((3, 1)), np.ones(3) / 3)
    with pytest.raises(DyncompError, match="nothing is left"):
        swept_shares(1.0, 3, damping=(4.0, 1.0))


def test_an_unknown_way_is_refused(unchecked):
    with pytest.raises(DyncompError, match="'take' or 'official'"):
        share_thresholds(np.ones((3, 1)), np.ones(2) / 2, short="leave")
