"""Losses over sub-models and first-confident exits, against float64 and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp import depth
from dyncomp.core.errors import DyncompError

X, B, V = 4, 32, 9
RNG = np.random.default_rng(0)
quick = settings(deadline=None, derandomize=True, max_examples=30)


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def float32(values):
    return jnp.asarray(values, jnp.float32)


def test_loss_is_the_mean_over_exits_of_masked_means():
    ce, mask = RNG.uniform(0, 5, (X, 3, 7)), RNG.integers(0, 2, (3, 7))
    wanted = np.mean([(ce[x] * mask).sum() / mask.sum() for x in range(X)])
    weights = depth.sub_model_weights(X)
    ours = depth.sorted_loss(float32(ce), weights, float32(mask))
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    order = RNG.permutation(X)
    swapped = depth.sorted_loss(float32(ce[order]), weights[order], float32(mask))
    np.testing.assert_allclose(swapped, ours, rtol=1e-6)
    assert float(depth.sorted_loss(float32(ce), weights, jnp.zeros((3, 7)))) == 0.0


def test_one_sub_model_is_plain_fine_tuning():
    ce = float32(RNG.uniform(0, 5, (1, B)))
    for weights in (
        depth.sub_model_weights(1),
        depth.sub_model_weights(1, "sample", jax.random.key(0)),
    ):
        value, grad = jax.value_and_grad(depth.sorted_loss)(ce, weights)
        np.testing.assert_allclose(value, np.mean(np.asarray(ce, np.float64)), rtol=1e-6)
        np.testing.assert_allclose(grad, np.full((1, B), 1 / B), rtol=1e-6)


def test_sampling_takes_one_sub_model_uniformly():
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = np.asarray(jax.vmap(lambda key: depth.sub_model_weights(X, "sample", key))(keys))
    assert set(np.unique(drawn)) == {0.0, 1.0} and (drawn.sum(1) == 1).all()
    np.testing.assert_allclose(drawn.mean(0), 1 / X, atol=5 * np.sqrt(0.25 * 0.75 / 4000))


def test_depths_are_checked():
    assert depth.check_depths([3, 6, 9, 12], 12) == (3, 6, 9, 12)
    for bad in ([], [3, 6], [6, 3, 12], [0, 12], [3, 3, 12]):
        with pytest.raises(DyncompError, match="increasing numbers of blocks"):
            depth.check_depths(bad, 12)
    with pytest.raises(DyncompError, match="random key"):
        depth.sub_model_weights(3, "sample")
    with pytest.raises(DyncompError, match="exits=0"):
        depth.sub_model_weights(0)


# exits


def first(confidence, tau):
    """The definition, one token at a time."""
    exits = []
    for token in range(confidence.shape[1]):
        early = [x for x, t in enumerate(tau) if confidence[x, token] >= t]
        exits.append(early[0] if early else len(tau))
    return exits


def test_confidence_is_the_largest_probability():
    logits = RNG.normal(size=(X, B, V)) * 4
    p = np.exp(logits)
    ours = depth.max_probability(float32(logits))
    np.testing.assert_allclose(ours, (p / p.sum(-1, keepdims=True)).max(-1), rtol=1e-5)
    sure = jnp.full((1, V), -jnp.inf).at[0, 2].set(5.0)
    assert float(depth.max_probability(sure)[0]) == 1.0


@quick
@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.1]), min_size=X - 1, max_size=X - 1))
def test_first_confident_exit(tau):
    confidence = RNG.choice([0.1, 0.3, 0.6, 0.95], (X, B))
    plan = depth.first_confident(float32(confidence), float32(tau))
    wanted = first(np.float32(confidence), np.float32(tau))
    assert plan.exit.tolist() == wanted and plan.exit.dtype == jnp.int32
    # Depth does not fall in any threshold.
    for x in range(X - 1):
        higher = float32([t + 0.35 * (i == x) for i, t in enumerate(tau)])
        assert (depth.first_confident(float32(confidence), higher).exit >= plan.exit).all()


def test_thresholds_at_the_ends():
    confidence = depth.max_probability(float32(RNG.normal(size=(X, B, V)) * 50))
    assert (depth.first_confident(confidence, float32([1.01] * (X - 1))).exit == X - 1).all()
    assert (depth.first_confident(confidence, jnp.zeros(X - 1)).exit == 0).all()


def test_permuting_samples_permutes_exits():
    confidence, order = float32(RNG.uniform(size=(X, B))), RNG.permutation(B)
    tau = float32([0.8, 0.6, 0.4])
    exits = depth.first_confident(confidence, tau).exit
    assert len(set(exits.tolist())) == X
    shuffled = depth.first_confident(confidence[:, order], tau).exit
    np.testing.assert_array_equal(shuffled, exits[order])


def test_random_exits_have_the_histogram(counting_jit):
    exits = jnp.asarray(RNG.integers(0, X, 500), jnp.int32)
    one, two = (depth.shuffled_exits(jax.random.key(seed), exits) for seed in (0, 1))
    np.testing.assert_array_equal(np.bincount(one), np.bincount(exits))
    assert (one != two).any() and (one != exits).any()
    shares = float32([3, 0, 1, 4])
    draw, traces = counting_jit(lambda key, shares: depth.drawn_exits(key, shares, 8000))
    drawn = np.bincount(draw(jax.random.key(2), shares), minlength=X) / 8000
    assert drawn[1] == 0
    np.testing.assert_allclose(drawn, np.asarray([3, 0, 1, 4]) / 8, atol=5 * np.sqrt(0.25 / 8000))
    draw(jax.random.key(2), float32([1, 1, 1, 1]))
    assert len(traces) == 1
