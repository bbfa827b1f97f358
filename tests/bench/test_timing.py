"""Statistics and rows against numbers from elsewhere."""

import numpy as np
import pytest
from scipy.stats import binom

from dyncomp.bench.timing import Pairs, Stopwatch, interleaved, median_interval, row, row_of_pairs

COMMON = {
    *("id", "ratio", "interval", "goal", "relation", "holds", "reference", "peer"),
    *("median_ours", "median_peer", "needed", "executed", "runs"),
}


def test_interval_from_the_tables():
    """n = 30: the 10th and 21st value cover the median with 95.7%; n = 6: the extremes with 96.9%."""
    assert median_interval([float(n) for n in range(1, 31)]) == (15.5, (10, 21))
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (3.5, (1, 6))
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3, None)
    assert median_interval([7.0]) == (7.0, None)


@pytest.mark.parametrize("n", [6, 7, 12, 31, 40, 100, 1500])
def test_interval_is_the_narrowest_that_covers(n):
    low, high = median_interval([float(i + 1) for i in range(n)])[1]
    assert high == n + 1 - low
    coverage = lambda i: 1 - 2 * binom.cdf(i - 1, n, 0.5)
    assert coverage(low) >= 0.95 > coverage(low + 1)


def test_interval_covers_the_true_median_as_often_as_it_says():
    """Skewed draws with median log 2: at least 95% of 2,000 intervals, up to 3 standard errors of counting."""
    draws = np.random.default_rng(0).exponential(size=(2000, 30)).tolist()
    hits = [low <= np.log(2) <= high for _, (low, high) in map(median_interval, draws)]
    assert 0.95 - 0.015 <= np.mean(hits) <= 0.957 + 0.015


def test_pairs_take_turns():
    calls = []
    found = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), 3, warm_up=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    times = (found.ours, found.peer, found.ours_cpu, found.peer_cpu)
    assert [len(each) for each in times] == [3, 3, 3, 3]


def test_a_stopwatch_tells_work_from_waiting():
    import time

    wall, cpu = [], []
    watch = Stopwatch()
    time.sleep(0.2)
    watch.stop(wall, cpu)
    assert wall[0] >= 0.2 > 0.15 > cpu[0]


def test_row_of_pairs_by_hand():
    """Ratios 2, .5, 1, 1, 1, 1, 3 have median 1; of the wall clock's medians 2 and 2."""
    ours, peer = [4.0, 1.0, 2.0, 2.0, 2.0, 2.0, 6.0], [2.0] * 7
    pairs = Pairs(ours, peer, [1.0] * 7, [4.0] * 7)
    made = row_of_pairs("b/r", pairs, reference="x", goal=1.03, relation="<=", peer="p")
    assert set(made) >= COMMON
    assert made["ratio"] == 1.0 and made["interval"] == [0.5, 3.0] and made["runs"] == 7
    assert made["holds"] == "unresolved" and made["peer"] == "p"
    assert (made["median_ours"], made["median_peer"]) == (2.0, 2.0)
    assert made["cpu_ratio"] == 0.25 and made["clock"] == "wall"
    assert row_of_pairs("b/r", pairs, reference="x", clock="cpu")["wall_ratio"] == 1.0


@pytest.mark.parametrize(
    "ratio, interval, goal, relation, holds",
    [
        (1.0, (0.9, 1.02), 1.03, "<=", True),
        (1.0, (0.9, 1.04), 1.03, "<=", "unresolved"),
        (1.1, (1.04, 1.2), 1.03, "<=", False),
        (1.1, None, 1.03, "<=", "unresolved"),
        (1.1, (1.0, 1.2), 0.9, ">=", True),
        (1.1, (1.05, 1.12), 0.15, "abs(ratio - 1) <= goal", True),
        (0.8, (0.7, 0.84), 0.15, "abs(ratio - 1) <= goal", False),
        (0.9, (0.8, 0.95), 0.15, "abs(ratio - 1) <= goal", "unresolved"),
        (1.0, (0.9, 1.1), 0.15, "abs(ratio - 1) <= goal", True),
        (1.0, (0.8, 1.1), 0.15, "abs(ratio - 1) <= goal", "unresolved"),
        (1.0, (1.0, 1.0), None, "report", None),
    ],
)
def test_verdicts(ratio, interval, goal, relation, holds):
    made = row("b/r", ratio, interval, reference="x", runs=9, goal=goal, relation=relation)
    assert set(made) == COMMON and made["holds"] == holds


def test_a_row_may_bring_its_own_verdict():
    made = row("b/r", 1.0, (1.0, 1.0), reference="x", runs=1, goal=1.0, relation="all", holds=False)
    assert made["holds"] is False
