"""Scores of sparse patterns against loops, and what they choose."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention.selection import (
    best,
    best_blocks,
    pooled_scores,
    recent_attention,
    slash_scores,
    vertical_scores,
)

B, H, G, P = 2, 4, 2, 8


@pytest.fixture(scope="module")
def probed():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(B, 5, H, P)), rng.normal(size=(B, 13, G, P))
    place = np.arange(7, 12)
    real = np.ones((B, 13), bool)
    real[0, :2] = False
    given = [jnp.asarray(x, jnp.float32) for x in (q, k)]
    found = recent_attention(*given, jnp.asarray(place, jnp.int32), jnp.asarray(real))
    return q, k, place, real, np.asarray(found)


def test_recent_attention(probed):
    q, k, place, real, found = probed
    for n, j, r in np.ndindex(B, H, 5):
        keys = [key for key in range(place[r] + 1) if real[n, key]]
        scores = k[n, keys, j // 2] @ q[n, r, j] / np.sqrt(P)
        want = np.zeros(13)
        want[keys] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        np.testing.assert_allclose(found[n, j, r], want, atol=1e-6)


def test_lines(probed):
    *_, place, _, weights = probed
    vertical = np.asarray(vertical_scores(jnp.asarray(weights)))
    slash = np.asarray(slash_scores(jnp.asarray(weights), jnp.asarray(place, jnp.int32)))
    for n, j, at in np.ndindex(B, H, 13):
        assert vertical[n, j, at] == pytest.approx(weights[n, j, :, at].sum(), abs=1e-6)
        own = [weights[n, j, r, place[r] - at] for r in range(5) if place[r] >= at]
        assert slash[n, j, at] == pytest.approx(sum(own), abs=1e-6)


def test_pooled_scores():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(B, 10, H, P)), rng.normal(size=(B, 7, G, P))
    found = pooled_scores(jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32), 4, 3)
    assert found.shape == (B, H, 3, 3)
    for n, j, x, y in np.ndindex(found.shape):
        rows, keys = q[n, 4 * x : 4 * x + 4, j], k[n, 3 * y : 3 * y + 3, j // 2]
        assert float(found[n, j, x, y]) == pytest.approx(rows.mean(0) @ keys.mean(0), abs=1e-5)


def test_best_places():
    scores = jnp.asarray([[0.1, 5.0, 3.0, 9.0, 4.0, 8.0]])
    index, count = best(scores, 4, 3)
    assert (index[0, :3].tolist(), count.tolist()) == ([1, 3, 5], [3])
    index, count = best(scores, 4, 4, forced=1, limit=5)
    assert (index[0].tolist(), count.tolist()) == ([0, 1, 3, 4], [4])
    index, count = best(scores, 6, 9, limit=2)
    assert (index[0, :2].tolist(), count.tolist()) == ([0, 1], [2])


def test_best_blocks():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 5, 5)), jnp.float32)
    causal = jnp.tril(jnp.ones((5, 5), bool))
    forced = jnp.eye(5, dtype=bool)
    found = np.asarray(best_blocks(scores, 2, causal, forced))
    for j, x in np.ndindex(2, 5):
        others = sorted(range(x), key=lambda y: -float(scores[0, j, x, y]))
        assert set(np.flatnonzero(found[0, j, x])) == {x, *others[:1]}
