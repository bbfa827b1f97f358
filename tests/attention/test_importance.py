"""Token importance against whole attention matrices in float64, and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention import ImportantTokens, Sight, attend
from dyncomp.attention.importance import key_mass, later, seen_by
from dyncomp.attention.selection import covering, split_by
from dyncomp.core.errors import DyncompError

B, T, H, G, P = 2, 50, 4, 2, 8
PLACE = jnp.arange(T, dtype=jnp.int32)
REAL = jnp.ones((B, T), bool)


def drawn(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (B, T, H, P), (B, T, G, P), (B, T, G, P)
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def matrix(q, k, first=0):
    """Causal softmax attention, the mean over heads, of real tokens from ``first`` on: float64 [b t t]."""
    q, k = np.asarray(q, np.float64), np.repeat(np.asarray(k, np.float64), H // G, axis=2)
    scores = np.einsum("bthp,bshp->bhts", q, k) / np.sqrt(P)
    i, j = np.arange(T)[:, None], np.arange(T)[None]
    seen = (j <= i) & (j >= first)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - np.where(seen.any(1), scores.max(-1), 0.0)[..., None])
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total > 0, total, 1)).mean(axis=1)


@functools.lru_cache
def chooser(**words):
    return jax.jit(ImportantTokens(**words).choose)


def choose(q, k, real=REAL, tau=None, budget=None, **words):
    return chooser(**words)(q, k, PLACE, real, tau, budget)


@pytest.mark.parametrize("normaliser", ["columns", "probe"])
def test_all_queries_give_the_exact_scores(normaliser):
    """Property 3: every query once, by either normaliser (T - j queries see token j)."""
    q, k, _ = drawn()
    found = choose(q, k, probe="all", normaliser=normaliser)
    a = matrix(q, k).sum(axis=1)
    np.testing.assert_allclose(found.mass, a, rtol=2e-5)
    scores = a / (T - np.arange(T))
    np.testing.assert_allclose(found.scores[:, :-1], scores[:, :-1], rtol=2e-5)
    np.testing.assert_allclose(found.mass.sum(axis=1), T, rtol=1e-5)
    for row in range(B):
        ordered = np.sort(a[row])[::-1]
        p = int(np.argmax(np.cumsum(ordered) >= 0.975 * T)) + 1
        assert int(found.count[row]) == int(found.wanted[row]) == p
        order, best = np.asarray(found.order[row]), np.argsort(-scores[row, :-1])[: p - 1]
        np.testing.assert_array_equal(order[:p], np.sort([*best, T - 1]))
        np.testing.assert_array_equal(order[p:], np.setdiff1d(np.arange(T), order[:p]))


def test_probes_are_the_newest_and_earlier_ones():
    q, k, _ = drawn(1)
    rows = matrix(q, k)
    recent = choose(q, k, probe="recent", recent=7)
    np.testing.assert_allclose(recent.mass, rows[:, -7:].sum(axis=1), rtol=2e-5, atol=1e-6)
    assert recent.probes == 7
    both = choose(q, k, probe="both", recent=7, drawn=400)
    # Four hundred draws from the first 43 queries, with replacement, come near their mean.
    want = rows[:, -7:].sum(axis=1) + 400 * rows[:, :-7].mean(axis=1)
    np.testing.assert_allclose(both.mass.sum(axis=1), 407, rtol=1e-5)
    assert np.abs(both.mass - want).max() < 0.15 * want.max() and both.probes == 407
    alone = choose(q, k, probe="random", drawn=400)
    np.testing.assert_allclose(alone.mass.sum(axis=1), 400, rtol=1e-5)


def test_uniform_causal_attention_has_closed_forms():
    """Property 4: a_0 / a_(n-1) = n H_n falls to H_n by the normaliser."""
    q, k, _ = drawn()
    found = choose(0 * q, k, probe="all")
    inverse = 1 / np.arange(1, T + 1)
    a = np.cumsum(inverse[::-1])[::-1]
    np.testing.assert_allclose(found.mass[0], a, rtol=1e-5)
    scores = a / (T - np.arange(T))
    np.testing.assert_allclose(found.scores[0, :-1], scores[:-1], rtol=1e-5)
    harmonic = inverse.sum()
    np.testing.assert_allclose(found.mass[0, 0] / found.mass[0, -1], T * harmonic, rtol=1e-4)
    np.testing.assert_allclose(found.scores[0, 0] * T, harmonic, rtol=1e-4)


@pytest.mark.parametrize(
    ("n", "tau", "p"), [(100, 0.96, 96), (100, 0.5, 50), (100, 0.005, 1), (7, 1.0, 7)]
)
def test_covering_a_uniform_mass(n, tau, p):
    """Property 2: p = ceil(tau n), which plain float32 sums miss by one at 100 and .96."""
    mass = jnp.full((n,), np.float32(1.0))
    assert int(covering(mass / 3, tau, jnp.float32(n) / 3)) == p


def test_covering_grows_with_the_share_and_is_least():
    mass = jnp.asarray(np.random.default_rng(0).gamma(0.3, size=(5, 200)), jnp.float32)
    total = jnp.sum(mass, axis=1)
    call = jax.jit(covering)
    counts = np.stack([call(mass, jnp.float32(tau), total) for tau in np.linspace(0.05, 1, 20)])
    assert np.all(np.diff(counts, axis=0) >= 0) and np.all(counts[-1] == 200)
    ordered = np.sort(np.asarray(mass, np.float64), axis=1)[:, ::-1]
    sums = np.cumsum(ordered, axis=1) / ordered.sum(axis=1, keepdims=True)
    for tau, row in zip(np.linspace(0.05, 1, 20)[:-1], counts[:-1], strict=True):
        np.testing.assert_array_equal(row, (sums < tau - 1e-5).sum(axis=1) + 1)
    assert call._cache_size() == 1


def test_one_column_takes_all():
    mass = jnp.zeros((1, 30)).at[0, 4].set(30.0)
    assert int(covering(mass, 0.975, jnp.float32([30.0]))[0]) == 1


def test_the_split_is_a_permutation_in_order():
    scores = jnp.asarray([[3.0, 1.0, 3.0, 2.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    real = jnp.asarray([[True, True, True, True, False], [False, True, True, True, True]])
    order = split_by(scores, jnp.asarray([2, 3]), real)
    np.testing.assert_array_equal(order, [[0, 2, 1, 3, 4], [1, 2, 3, 4, 0]])


def test_who_sees_whom_under_padding():
    real = jnp.asarray([[False, True, True, False, True]])
    np.testing.assert_array_equal(later(real), [[3, 3, 2, 1, 1]])
    np.testing.assert_array_equal(seen_by(jnp.asarray([[4, 2, 2, -1]]), 5), [[3, 3, 3, 1, 1]])


def test_padding_in_front_changes_nothing():
    q, k, _ = drawn(2)
    first = 9
    real = REAL.at[0, :first].set(False)
    found = choose(q, k, real, probe="all")
    a = matrix(q, k, first)[0, first:].sum(axis=0)
    np.testing.assert_allclose(found.mass[0], a, rtol=2e-5, atol=1e-6)
    assert int(found.real[0]) == T - first and int(found.count[0]) <= T - first
    np.testing.assert_array_equal(np.sort(found.order[0, T - first :]), np.arange(first))
    few = choose(q, k, REAL.at[0, :-3].set(False), probe="both", recent=7, drawn=5)
    np.testing.assert_allclose(
        few.mass[0].sum(), 3, rtol=1e-5
    )  # three real queries, none before them


def test_queries_that_do_not_count_give_nothing():
    q, k, _ = drawn()
    place = jnp.broadcast_to(PLACE, (B, T))
    none = key_mass(q, k, -jnp.ones_like(place), REAL)
    np.testing.assert_array_equal(none, 0)


def test_accumulated_prefers_early_tokens():
    q, k, _ = drawn()
    early = lambda ranking: np.sort(
        choose(2.0 * q, k, budget=jnp.full((B,), 20), probe="all", ranking=ranking).order[:, :20]
    ).mean()
    assert early("accumulated") + 1 < early("normalised")
    draws = [choose(q, k, budget=jnp.full((B,), 20), ranking="random").order[:, :20] for _ in "ab"]
    np.testing.assert_array_equal(*draws)
    assert set(np.asarray(draws[0][0]).tolist()) != set(np.asarray(draws[0][1]).tolist())
    assert np.all(np.asarray(draws[0])[:, -1] == T - 1)


def test_adding_to_the_logits_of_a_row_changes_nothing():
    """Property 10: every key moved by one vector adds q.c to all logits of a query."""
    q, k, _ = drawn(3)
    before = choose(q, k, probe="all", tau=jnp.float32(0.9))
    after = choose(q, k + 0.7, probe="all", tau=jnp.float32(0.9))
    np.testing.assert_array_equal(before.count, after.count)
    np.testing.assert_array_equal(before.order, after.order)


def test_tau_and_the_cap():
    q, k, _ = drawn()
    every = choose(q, k, tau=jnp.float32(1.0))
    np.testing.assert_array_equal(every.count, [T, T])
    capped = choose(q, k, tau=jnp.float32(1.0), most=12)
    np.testing.assert_array_equal(capped.count, [12, 12])
    np.testing.assert_array_equal(capped.wanted, [T, T])
    best = np.argsort(-np.asarray(capped.scores[0]), kind="stable")[:12]
    np.testing.assert_array_equal(capped.order[0, :12], np.sort(best))


@functools.lru_cache
def pattern(**words):
    return jax.jit(ImportantTokens(tile=16, **words))


def whole():
    return Sight(PLACE, jnp.broadcast_to(PLACE, (B, T)))


def test_everything_important_is_dense():
    """Property 1, alone and behind a cache with padding in front and empty slots behind."""
    q, k, v = drawn()
    mixed, _ = pattern(tau=1.0)(q, k, v, whole())
    np.testing.assert_allclose(mixed, attend(q, k, v, whole().all()), atol=3e-6)
    keys = jax.random.split(jax.random.key(5), 2)
    k, v = (jax.random.normal(key, (B, 90, G, P)) for key in keys)
    slots = jnp.arange(90, dtype=jnp.int32)
    places = jnp.where((slots >= 3) & (slots < 20 + T), slots, -1)
    sight = Sight(20 + PLACE, jnp.broadcast_to(places, (B, 90)))
    mixed, _ = pattern(tau=1.0)(q, k, v, sight)
    np.testing.assert_allclose(mixed, attend(q, k, v, sight.all()), atol=3e-6)


def test_rows_depend_on_important_tokens_only():
    """Property 5: zeros outside T; the rest is dense attention among T."""
    q, k, v = drawn(4)
    words = {"tau": 0.7, "probe": "all"}
    found = choose(q, k, **words)
    mixed, pairs = pattern(**words)(q, k, v, whole())
    inside = np.zeros((B, T), bool)
    for row in range(B):
        inside[row, np.asarray(found.order[row, : found.count[row]])] = True
    assert 5 < inside.sum(axis=1).min() and inside.sum(axis=1).max() < T - 5
    want = attend(q, k, v, whole().all() & jnp.asarray(inside)[:, None])
    np.testing.assert_allclose(mixed[inside], np.asarray(want)[inside], atol=3e-6)
    assert not np.asarray(mixed)[~inside].any()
    v = jnp.where(jnp.asarray(inside)[:, :, None, None], v, jnp.nan)
    poisoned, _ = pattern(**words)(q, k, v, whole())
    np.testing.assert_array_equal(poisoned, mixed)
    tiles = -(-np.asarray(found.count) // 16)
    blocks = -(-int(np.sum(tiles * (tiles + 1) // 2) * 256) // B)
    assert float(pairs.executed) == blocks + T * T / 2
    p = np.asarray(found.count)
    assert float(pairs.needed) == np.mean(p * (p + 1) // 2) + T * T / 2


def test_bad_words_are_refused():
    for words, match in (
        ({"ranking": "best"}, "normalised"),
        ({"probe": "none"}, "recent"),
        ({"normaliser": "n"}, "columns"),
        ({"tau": 0.0}, "more than 0"),
        ({"most": 0}, "at least 1"),
    ):
        with pytest.raises((DyncompError, TypeError), match=match):  # typed calls raise the latter
            ImportantTokens(**words)
