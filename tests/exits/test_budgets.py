"""Thresholds for a budget: held-out compute, monotone in the budget, brute force, bounds."""

import itertools

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits.budgets import (
    deepest_exit,
    leaves_at,
    leaves_within,
    most_within,
    quota_of,
    solve_thresholds,
)

COSTS = np.asarray([0.1, 0.25, 0.5, 0.7, 1.0])


def confidences(count, seed, exits=4):
    """Easy and hard examples: a later exit is surer, and what it says is close to the one before."""
    rng = np.random.default_rng(seed)
    ease = (
        rng.normal(size=(count, 1)) + 0.5 * np.arange(exits) + 0.5 * rng.normal(size=(count, exits))
    )
    return 1 / (1 + np.exp(-ease))


@pytest.mark.parametrize("shape", ["quantile", "geometric"])
@pytest.mark.parametrize("mean", [0.15, 0.3, 0.5, 0.8])
def test_mean_compute_of_held_out_examples_is_within_three_percent(mean, shape):
    thresholds = solve_thresholds(confidences(20_000, 0), COSTS, mean, shape=shape)
    spent = COSTS[leaves_at(confidences(20_000, 1), thresholds)].mean()
    assert spent == pytest.approx(mean, rel=0.03)
    own = COSTS[leaves_at(confidences(20_000, 0), thresholds)].mean()
    assert mean * 0.995 < own <= mean


def test_thresholds_rise_with_the_budget():
    scores, before = confidences(500, 0), np.full(4, -np.inf)
    for mean in np.linspace(0.1, 1.0, 50):
        found = solve_thresholds(scores, COSTS, mean)
        assert (found >= before).all()
        before = found
    assert (before == np.inf).all()


def test_small_cases_by_brute_force():
    """Of all levels, the one that spends most without exceeding the mean."""
    for seed in range(20):
        scores = confidences(7, seed, exits=3)
        costs, mean = COSTS[[0, 1, 2, 4]], 0.1 + 0.04 * seed
        ordered = np.concatenate([np.sort(scores, axis=0), np.full((1, 3), np.inf)])
        spent = [costs[leaves_at(scores, row)].mean() for row in ordered]
        best = max(value for value in spent if value <= mean)
        found = solve_thresholds(scores, costs, mean)
        assert costs[leaves_at(scores, found)].mean() == best
        # No choice of thresholds beats the mean that it may spend.
        options = itertools.product(*ordered.T)
        assert (
            max(v for t in options if (v := costs[leaves_at(scores, np.asarray(t))].mean()) <= mean)
            >= best
        )


def test_nobody_exceeds_the_peak_or_the_memory():
    scores, held_out = confidences(5000, 0), confidences(5000, 1)
    thresholds = solve_thresholds(scores, COSTS, 0.3, peak=0.6)
    exits = leaves_at(held_out, thresholds)
    assert exits.max() == 2 and COSTS[exits].max() <= 0.6
    assert COSTS[exits].mean() == pytest.approx(0.3, rel=0.03)
    resident = np.asarray([1.0, 2.0, 3.0, 4.0, 5.0])
    tight = solve_thresholds(scores, COSTS, 0.9, resident=resident, memory=2.5)
    np.testing.assert_array_equal(tight, [np.inf, -np.inf, -np.inf, -np.inf])
    assert deepest_exit(COSTS) == 4 and deepest_exit(COSTS, 0.5, resident, 2.0) == 1


def test_what_cannot_be_met_is_refused():
    scores = confidences(10, 0)
    with pytest.raises(DyncompError, match=r"below the first exit's cost, 0\.1"):
        solve_thresholds(scores, COSTS, 0.05)
    with pytest.raises(DyncompError, match="not even the first exit fits"):
        solve_thresholds(scores, COSTS, 0.5, peak=0.01)
    with pytest.raises(DyncompError, match="give resident"):
        deepest_exit(COSTS, memory=3.0)
    with pytest.raises(DyncompError, match="need 5 costs"):
        solve_thresholds(scores, COSTS[:3], 0.5)


def one_by_one(scores, thresholds, quota):
    """The rule of a quota as a list of who is still in, exit by exit."""
    exits, inside = [None] * len(scores), list(range(len(scores)))
    for exit in range(len(thresholds)):
        staying = [i for i in inside if scores[i, exit] < thresholds[exit]]
        room = int(quota[exit] * len(scores) + 1e-9)
        going = sorted(staying, key=lambda i: scores[i, exit])[:room]
        for i in inside:
            if i not in going:
                exits[i] = exit
        inside = [i for i in inside if i in going]
    return [len(thresholds) if e is None else e for e in exits]


def test_a_quota_bounds_every_batch():
    thresholds = np.asarray([0.6, 0.7, 0.7, 0.8])
    usual = leaves_at(confidences(5_000, 2), thresholds)
    quota = quota_of(usual, 4, 1.1)
    np.testing.assert_allclose(quota, [1.1 * (usual > i).mean() for i in range(4)])
    bound, free = most_within(COSTS, quota), np.ones(4)
    assert bound == pytest.approx(COSTS[usual].mean() * 1.1 - 0.1 * COSTS[0])
    for seed in range(5):
        scores = confidences(40, seed)
        np.testing.assert_array_equal(
            leaves_within(scores, thresholds, free), leaves_at(scores, thresholds)
        )
        doubtful = 0.5 * scores  # an attack: nobody would leave
        assert (leaves_at(doubtful, thresholds) == 4).all()
        for one in (scores, doubtful):
            exits = leaves_within(one, thresholds, quota)
            assert list(exits) == one_by_one(one, thresholds, quota)
            assert COSTS[exits].mean() <= bound + 1e-9
    assert quota_of(usual, 4, 9.0).max() == 1.0
    assert most_within(COSTS, np.asarray([0.5, 0.8, 0.1, 0.4])) == pytest.approx(
        0.1 + 0.5 * 0.15 + 0.5 * 0.25 + 0.1 * 0.2 + 0.1 * 0.3
    )
    unknown = np.full((4, 4), np.nan)
    assert (leaves_within(unknown, thresholds, np.zeros(4)) == 0).all()
    assert (leaves_within(unknown, thresholds, free) == 4).all()
