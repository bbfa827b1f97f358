"""Look-once eviction against attention written out in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention.look_once import looked_at, most_looked_at

B, T, H, G, P = 2, 13, 4, 2, 6


def drawn(seed=0):
    q, k = jax.random.split(jax.random.key(seed))
    return jax.random.normal(q, (B, T, H, P)), jax.random.normal(k, (B, T, G, P))


def want(q, k, real, share):
    """One row: mean over the heads and those of the last real queries that see a token of causal, scaled attention."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    places = np.flatnonzero(real)
    asked = places[-max(math.ceil(share * len(places)), 1) :]
    total = np.zeros(len(real))
    for at in asked:
        seen = places[places <= at]
        for head in range(H):
            scores = k[seen, head // (H // G)] @ q[at, head] / math.sqrt(P)
            weights = np.exp(scores - scores.max())
            total[seen] += weights / weights.sum()
    seers = np.asarray([max((asked >= at).sum(), 1) for at in range(len(real))])
    return total / (seers * H)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("rows", [2, 64])
def test_weights_by_hand(share, rows):
    q, k = drawn()
    real = np.ones((B, T), bool)
    real[0, :3], real[1, 9:] = False, False
    got, pairs = jax.jit(lambda q, k, real: looked_at(q, k, real, share, rows))(
        q, k, jnp.asarray(real)
    )
    for row in range(B):
        np.testing.assert_allclose(
            got[row], want(q[row], k[row], real[row], share), rtol=1e-5, atol=1e-7
        )
    assert int(pairs) == -(-math.ceil(share * T) // rows) * rows * T


def test_earlier_queries_do_not_matter():
    """Property 6."""
    q, k = drawn()
    real = jnp.ones((B, T), bool)
    got, _ = looked_at(q, k, real)
    last = math.ceil(0.2 * T)
    again, _ = looked_at(q.at[:, : T - last].set(9.0), k, real)
    np.testing.assert_array_equal(got, again)


def test_the_first_token_and_the_most_looked_at_stay():
    weight = jnp.asarray([[0.0, 0.3, 0.1, 0.4, 0.2, 9.0], [9.0, 0.0, 0.3, 0.1, 0.0, 0.2]])
    prompt = jnp.asarray([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]], bool)
    stay = jax.jit(most_looked_at)(weight, prompt, jnp.float32(0.6))
    assert stay.tolist() == [
        [True, True, False, True, False, False],
        [False, True, True, False, False, True],
    ]
    assert jnp.all(most_looked_at(weight, prompt, 1.0) == prompt)
    assert most_looked_at(weight, prompt, 0.01).sum(axis=1).tolist() == [1, 1]
    assert not most_looked_at(weight, jnp.zeros_like(prompt), 0.5).any()
