"""Choices against brute force, closed forms and fixed-seed statistics; all ties go to the lower index."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dyncomp.core import choose
from dyncomp.core.errors import DyncompError

quick = settings(deadline=None, derandomize=True, max_examples=30)
scores = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.25, 2.0]), min_size=6, max_size=6)


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def best_first(row):
    """Python's stable sort: equal scores stay in order of their index."""
    return sorted(range(len(row)), key=lambda i: -row[i])


def kept(plan, row=0):
    """The alternatives that a row of a route plan uses, in the order of the slots."""
    return [int(e) for e, keep in zip(plan.experts[row], plan.keep[row], strict=True) if keep]


def float32(values):
    return jnp.asarray(values, jnp.float32)


@quick
@given(scores, st.integers(1, 6))
def test_top_k_and_ranked(row, k):
    order = best_first(row)
    plan = choose.top_k(float32([row]), k)
    assert kept(plan) == order[:k]
    assert plan.weights[0].tolist() == [row[i] for i in order[:k]]
    values, ranked = choose.ranked(float32([row]))
    assert ranked[0].tolist() == order and values[0].tolist() == [row[i] for i in order]
    assert plan.experts.dtype == ranked.dtype == jnp.int32


def test_top_k_renormalized_and_its_gradient():
    """w_1 = a / (a + b): derivatives b / (a + b)^2 and -a / (a + b)^2, none to what was not chosen."""
    a, b = 0.5, 0.25
    first = lambda s: choose.top_k(s, 2, renormalize=True).weights[0, 0]
    row = float32([[0.125, a, 0.0, b]])
    plan = choose.top_k(row, 2, renormalize=True)
    np.testing.assert_allclose(plan.weights[0], [2 / 3, 1 / 3], rtol=1e-6)
    expected = [0.0, b / (a + b) ** 2, 0.0, -a / (a + b) ** 2]
    np.testing.assert_allclose(jax.grad(first)(row)[0], expected, rtol=1e-6)


@quick
@given(st.lists(st.integers(0, 15), min_size=4, max_size=4), st.integers(0, 17))
def test_top_p(parts, sixteenths):
    """Probabilities and threshold in sixteenths, so that reaching p exactly is common and nothing rounds."""
    cuts = sorted([0, *(min(part, 16) for part in parts), 16])
    mass = [b - a for a, b in itertools.pairwise(cuts)]  # five sixteenths that sum to 16
    expected, above = [], 0
    for i in best_first(mass):
        if above <= sixteenths or sixteenths >= 16:
            expected.append(i)
        above += mass[i]
    probabilities = float32([mass]) / jnp.float32(16)
    plan = choose.top_p(probabilities, jnp.float32(sixteenths / 16))
    assert kept(plan) == expected
    assert plan.weights[0].tolist() == [
        mass[i] / 16 if i in expected else 0 for i in best_first(mass)
    ]
    held = sum(mass[i] for i in expected)
    assert held > sixteenths or sixteenths >= 16  # crosses p; without its last one it would not:
    assert held - mass[expected[-1]] <= sixteenths


def test_top_p_with_fewer_slots_truncates():
    plan = choose.top_p(float32([[0.25] * 4]), jnp.float32(0.9), max_slots=2)
    assert kept(plan) == [0, 1] and plan.experts.shape == (1, 2)


@quick
@given(scores, st.sampled_from([-2.0, 0.0, 0.25, 3.0]))
def test_threshold(row, tau):
    plan = choose.threshold(float32([row]), jnp.float32(tau))
    assert kept(plan) == [i for i in best_first(row) if row[i] >= tau]
    assert (np.asarray(plan.weights)[~np.asarray(plan.keep)] == 0).all()


def chi_square_fits(observed, probabilities, level=1e-4):
    """Pearson's statistic stays below the quantile that a true model passes once in 1 / level."""
    expected = np.asarray(probabilities) * np.sum(observed)
    assert expected.min() > 20
    statistic = float(((np.asarray(observed) - expected) ** 2 / expected).sum())
    return statistic < chi2.ppf(1 - level, len(expected) - 1)


def tally(rows, outcomes):
    """How often each outcome occurs among rows (sequences of integers)."""
    found = [tuple(row) for row in np.asarray(rows).tolist()]
    counts = [found.count(outcome) for outcome in outcomes]
    assert sum(counts) == len(found)
    return counts


def test_gumbel_top_k_is_plackett_luce():
    """P(i then j) = p_i p_j / (1 - p_i), for all ordered pairs."""
    logits, n = np.asarray([1.0, 0.0, -0.5, 0.5]), 20_000
    p = np.exp(logits) / np.exp(logits).sum()
    pairs = list(itertools.permutations(range(4), 2))
    rows = float32(np.tile(logits, (n, 1)))
    counts = tally(choose.gumbel_top_k(jax.random.key(0), rows, 2).experts, pairs)
    assert chi_square_fits(counts, [p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert not chi_square_fits(counts, [p[i] * p[j] for i, j in pairs] / (1 - (p**2).sum()))


def test_gumbel_weights_are_the_relaxed_sample():
    """Weights are softmax((logits + noise) / T): ranked, and one-hot as T -> 0; gradients by finite differences."""
    key, logits = jax.random.key(1), float32([[0.3, -0.2, 0.9, 0.1]])
    plan = choose.gumbel_top_k(key, logits, 4, temperature=0.7)
    np.testing.assert_allclose(jnp.sum(plan.weights), 1.0, rtol=1e-6)
    assert (jnp.diff(plan.weights[0]) < 0).all()
    cold = choose.gumbel_top_k(key, logits, 4, temperature=0.01)
    np.testing.assert_allclose(cold.weights[0], [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(cold.experts, plan.experts)
    # log w_1 - log w_2 = (z_1 - z_2) / T for the noisy logits z, so its slope in a chosen logit is 1 / T
    ratio = lambda l: (
        -jnp.diff(jnp.log(choose.gumbel_top_k(key, l, 2, temperature=0.7).weights))[0, 0]
    )
    expected = np.zeros((1, 4))
    expected[0, int(plan.experts[0, 0])], expected[0, int(plan.experts[0, 1])] = 1 / 0.7, -1 / 0.7
    np.testing.assert_allclose(jax.grad(ratio)(logits), expected, rtol=1e-4, atol=1e-5)


def test_straight_through():
    soft, hard = float32([0.2, 0.7]), float32([0.0, 1.0])
    # d/ds sum (c . (2 s)) through the soft path only; the hard path has a slope of its own that must not show
    through = lambda s: choose.straight_through(3.0 * s + hard, 2.0 * s)
    np.testing.assert_allclose(through(soft), 3.0 * soft + hard, rtol=1e-6)
    pulled = jax.vjp(through, soft)[1](float32([1.0, -5.0]))[0]
    np.testing.assert_allclose(pulled, [2.0, -10.0])


def test_random_slots_are_uniform_subsets():
    """Two of four: all twelve ordered pairs are equally likely, and every row has as many as it was told."""
    n = 12_000
    plan = choose.random_slots(jax.random.key(0), jnp.full(n, 2, jnp.int32), 4, max_slots=2)
    pairs = list(itertools.permutations(range(4), 2))
    assert chi_square_fits(tally(plan.experts, pairs), np.full(12, 1 / 12))
    assert bool(plan.keep.all()) and bool((plan.weights == 0.5).all())


def test_random_slots_follow_the_counts():
    counts = jnp.asarray([0, 1, 3, 4, 9], jnp.int32)
    plan = choose.random_slots(jax.random.key(3), counts, 4)
    assert plan.counts().tolist() == [0, 1, 3, 4, 4]
    assert all(sorted(row) == [0, 1, 2, 3] for row in plan.experts.tolist())
    np.testing.assert_allclose(plan.weights.sum(axis=1)[:4], [0, 1, 1, 1], rtol=1e-6)
    short = choose.random_slots(jax.random.key(3), counts[:3], 4, max_slots=3)
    assert short.counts().tolist() == [0, 1, 3]


@quick
@given(scores, st.integers(1, 6), st.sampled_from([-2.0, 0.0, 0.25, 3.0]))
def test_keep_top_and_above(row, k, tau):
    """Rows in order of place, not of score."""
    chosen = sorted(best_first(row)[:k])
    plan = choose.keep_top(float32(row), k)
    assert plan.index.tolist() == chosen and bool(plan.keep.all())
    assert plan.weights.tolist() == [row[i] for i in chosen]
    above = choose.keep_above(float32(row), jnp.float32(tau), max_rows=k)
    index = np.asarray(above.index)[np.asarray(above.keep)]
    assert index.tolist() == [i for i in chosen if row[i] >= tau]
    assert above.weights.tolist() == [row[i] if row[i] >= tau else 0.0 for i in chosen]


@quick
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_first_exit(leave):
    seen = np.arange(3.0 * len(leave)).reshape(-1, 3)
    plan = choose.first_exit(jnp.asarray(leave), float32(seen))
    assert plan.exit.tolist() == [row.index(True) if True in row else 3 for row in leave]
    np.testing.assert_array_equal(plan.scores[:, :3], seen)
    assert bool(jnp.isnan(plan.scores[:, 3]).all())  # the final classifier asks nothing


@pytest.mark.parametrize("k", [0, 5, -1])
def test_slots_outside_the_range_are_refused(k):
    row, key = float32([[0.1, 0.2, 0.3, 0.4]]), jax.random.key(0)
    calls = [
        lambda: choose.top_k(row, k),
        lambda: choose.top_p(row, jnp.float32(0.5), max_slots=k),
        lambda: choose.gumbel_top_k(key, row, k),
        lambda: choose.random_slots(key, jnp.asarray([1], jnp.int32), 4, max_slots=k),
        lambda: choose.keep_top(row[0], k),
        lambda: choose.keep_above(row[0], jnp.float32(0.5), max_rows=k),
    ]
    for call in calls:
        with pytest.raises(DyncompError, match=f"{k} slots of 4 alternatives: choose 1..4"):
            call()
