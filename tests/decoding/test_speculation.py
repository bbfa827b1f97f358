"""Acceptance of drafts against the definition, exact enumeration and the target's distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import accept_greedy, accept_sampled, next_window, residual

K, V = 2, 3
RNG = np.random.default_rng(0)
quick = settings(deadline=None, derandomize=True, max_examples=40)
greedily, sampled = jax.jit(accept_greedy), jax.jit(accept_sampled)


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def int32(values):
    return jnp.asarray(values, jnp.int32)


# greedy


def longest_prefix(drafts, length, greedy):
    kept = 0
    while kept < length and drafts[kept] == greedy[kept]:
        kept += 1
    return [*drafts[:kept], greedy[kept]]


@quick
@given(st.integers(0, 10_000))
def test_greedy_keeps_the_longest_right_prefix(seed):
    rng = np.random.default_rng(seed)
    drafts, greedy = rng.integers(0, 2, (6, 4)), rng.integers(0, 2, (6, 5))
    lengths = rng.integers(0, 5, 6)
    out = greedily(int32(drafts), int32(lengths), int32(greedy))
    for row in range(6):
        wanted = longest_prefix(drafts[row].tolist(), lengths[row], greedy[row].tolist())
        assert out.tokens[row].tolist() == wanted + [-1] * (5 - len(wanted))
        assert int(out.accepted[row]) == len(wanted) - 1
    assert out.tokens.dtype == out.accepted.dtype == jnp.int32


def test_what_lies_beyond_a_draft_is_not_looked_at():
    """The fourth draft is right, but the row drafted three."""
    greedy = int32([[5, 6, 7, 8, 9]])
    out = greedily(int32([[5, 6, 7, 8]]), int32([3]), greedy)
    assert out.tokens.tolist() == [[5, 6, 7, 8, -1]] and out.accepted.tolist() == [3]
    out = greedily(int32([[5, 6, 7, 8]]), int32([0]), greedy)
    assert out.tokens.tolist() == [[5, -1, -1, -1, -1]]


# stochastic: exact pieces


def test_accepting_or_replacing_gives_the_target_exactly():
    """sum_x q(x) [min(1, p/q) 1_x + (1 - min(1, p/q)) residual] = p, in float64 but for the residual."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        p, q = (rng.dirichlet(np.full(5, 0.4)) for _ in range(2))
        if seed % 3 == 0:
            p[rng.integers(5)] = 0
            p /= p.sum()
        kept = np.minimum(p, q)
        rest = np.asarray(residual(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32)))
        np.testing.assert_allclose(kept + (1 - kept.sum()) * rest, p, atol=1e-6)


def test_residual_where_nothing_is_left():
    p = jnp.asarray([[0.25, 0.75]], jnp.float32)
    np.testing.assert_array_equal(residual(p, p), p)
    np.testing.assert_array_equal(residual(p, jnp.zeros_like(p)), p)


# stochastic: the whole function

N = 120_000


@pytest.fixture(scope="module")
def models():
    """Draft and target distributions given the tokens so far: q[prefix], p[prefix], float64."""
    prefixes = [x for n in range(K + 1) for x in itertools.product(range(V), repeat=n)]
    rng = np.random.default_rng(5)
    q = {prefix: rng.dirichlet(np.ones(V)) for prefix in prefixes}
    p = {prefix: rng.dirichlet(np.ones(V)) for prefix in prefixes}
    p[(0,)] = np.asarray([0.0, 0.3, 0.7])  # a token that the target excludes
    return q, p


def verified(models, length):
    """N rows drafted from q and verified against p: (tokens [N k+1], accepted [N])."""
    q, p = models
    rng = np.random.default_rng(11)
    first = rng.choice(V, N, p=q[()])
    table = np.stack([q[(token,)] for token in range(V)])
    second = (rng.random((N, 1)) > np.cumsum(table[first], 1)).sum(1).clip(max=V - 1)
    drafts = np.stack([first, second], 1)
    proposed = np.stack([np.broadcast_to(q[()], (N, V)), table[first]], 1)
    pairs = np.stack([[p[(a, b)] for b in range(V)] for a in range(V)])
    target = [np.broadcast_to(p[()], (N, V)), np.stack([p[(a,)] for a in range(V)])[first]]
    target = np.stack([*target, pairs[first, second]], 1)
    lengths = int32(np.full(N, length))
    args = (jnp.asarray(x, jnp.float32) for x in (proposed, target))
    out = sampled(jax.random.key(2), int32(drafts), lengths, *args)
    return np.asarray(out.tokens), np.asarray(out.accepted)


def fits(counts, probabilities):
    """Chi-square at 1e-4 of counts against exact probabilities; nothing where they are zero."""
    live = probabilities > 0
    assert (counts[~live] == 0).all()
    expected = counts.sum() * probabilities[live] / probabilities.sum()
    statistic = ((counts[live] - expected) ** 2 / expected).sum()
    return statistic < chi2.ppf(1 - 1e-4, live.sum() - 1)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_the_text_has_the_targets_distribution(models, length):
    q, p = models
    tokens, accepted = verified(models, length)
    assert accepted.max() == length
    assert fits(np.bincount(tokens[:, 0], minlength=V), p[()])
    # Given what was emitted before, the next emitted token follows the target: also after a refusal.
    for prefix in itertools.product(range(V)):
        rows = tokens[(accepted >= 1) & (tokens[:, 0] == prefix[0])]
        if len(rows):
            assert fits(np.bincount(rows[:, 1], minlength=V), p[prefix])
    for prefix in itertools.product(range(V), repeat=2):
        rows = tokens[(accepted >= 2) & (tokens[:, :2] == prefix).all(1)]
        if len(rows):
            assert fits(np.bincount(rows[:, 2], minlength=V), p[prefix])


def test_acceptance_rate_is_the_overlap(models):
    q, p = models
    _, accepted = verified(models, 2)
    first = np.minimum(q[()], p[()])
    both = sum(first[a] * np.minimum(q[(a,)], p[(a,)]).sum() for a in range(V))
    assert np.mean(accepted >= 1) == pytest.approx(first.sum(), abs=5 * np.sqrt(0.25 / N))
    assert np.mean(accepted == 2) == pytest.approx(both, abs=5 * np.sqrt(0.25 / N))


def test_a_draft_equal_to_the_target_is_always_kept():
    p = jax.nn.softmax(jnp.asarray(RNG.normal(size=(500, 5, 7)), jnp.float32))
    drafts = jax.random.categorical(jax.random.key(0), jnp.log(p[:, :4]), axis=-1).astype(jnp.int32)
    out = sampled(jax.random.key(1), drafts, int32(np.full(500, 4)), p[:, :4], p)
    assert (out.accepted == 4).all()
    np.testing.assert_array_equal(out.tokens[:, :4], drafts)


def test_one_hot_distributions_are_greedy():
    drafts, greedy = int32(RNG.integers(0, 2, (20, 3))), int32(RNG.integers(0, 2, (20, 4)))
    lengths = int32(RNG.integers(0, 4, 20))
    hot = lambda tokens: jax.nn.one_hot(tokens, 4, dtype=jnp.float32)
    ours = sampled(jax.random.key(0), drafts, lengths, hot(drafts), hot(greedy))
    wanted = greedily(drafts, lengths, greedy)
    np.testing.assert_array_equal(ours.accepted, wanted.accepted)
    np.testing.assert_array_equal(ours.tokens, wanted.tokens)


def test_a_row_does_not_depend_on_the_batch():
    p = jax.nn.softmax(jnp.asarray(RNG.normal(size=(6, 4, V)), jnp.float32))
    q = jax.nn.softmax(jnp.asarray(RNG.normal(size=(6, 3, V)), jnp.float32))
    drafts, lengths = int32(RNG.integers(0, V, (6, 3))), int32(RNG.integers(0, 4, 6))
    whole = sampled(jax.random.key(0), drafts, lengths, q, p)
    part = sampled(jax.random.key(0), drafts[:2], lengths[:2], q[:2], p[:2])
    np.testing.assert_array_equal(whole.tokens[:2], part.tokens)


def test_places_are_checked():
    with pytest.raises(DyncompError, match="2 drafted tokens need 3 places of the target, got 2"):
        accept_greedy(int32([[1, 2]]), int32([2]), int32([[1, 2]]))


# windows


def test_windows():
    window = int32([4, 4, 4, 1, 7, 8, 3])
    accepted = int32([4, 3, 0, 0, 7, 8, 0])
    drafted = int32([4, 4, 4, 1, 7, 8, 0])
    moved = next_window(window, accepted, drafted, limit=8)
    assert moved.tolist() == [6, 3, 3, 1, 8, 8, 3] and moved.dtype == jnp.int32
    with pytest.raises(DyncompError, match="limit=0"):
        next_window(window, accepted, drafted, limit=0)
