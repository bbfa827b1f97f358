"""The saturation rule, its decay, its metric and the layer-wise loss, against float64 and brute force."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.exits import Decay, LayerwiseObjective, SaturationRule
from dyncomp.exits.saturation import (
    flat_cosine,
    joined_layers,
    saturated,
    similarities,
    time_reduction,
)

L, B, T, D = 5, 6, 4, 3


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


STATES = np.cumsum(draw(0, L + 1, B, T, D) / np.arange(1, L + 2)[:, None, None, None], axis=0)
MASK = np.arange(T)[None] < np.asarray([4, 3, 1, 2, 4, 4])[:, None]


def cosine(x, y, mask):
    """Of one example: only real tokens, one long vector, float64."""
    x, y = (part[mask].astype(np.float64).ravel() for part in (x, y))
    return x @ y / (np.linalg.norm(x) * np.linalg.norm(y))


BRUTE = np.asarray(
    [[cosine(STATES[i + 1, b], STATES[i, b], MASK[b]) for b in range(B)] for i in range(L)]
)


def test_cosine_of_whole_sequences_without_their_padding(strict):
    said = similarities(jnp.asarray(STATES), jnp.asarray(MASK))
    np.testing.assert_allclose(said, BRUTE, atol=1e-6)
    # Whatever stands in the padding, the same; neither the mean of the tokens' cosines nor the padded cosine.
    other = np.where(MASK[None, :, :, None], STATES, 100.0)
    np.testing.assert_array_equal(similarities(jnp.asarray(other), jnp.asarray(MASK)), said)
    each = [[cosine(STATES[1, b, t], STATES[0, b, t], ...) for t in range(T)] for b in range(B)]
    assert np.abs(np.mean(each, axis=1)[MASK.all(1)] - BRUTE[0][MASK.all(1)]).max() > 1e-3
    padded = similarities(jnp.asarray(other))
    assert (np.asarray(padded)[:, 2] > 0.99).all() and BRUTE[:, 2].min() < 0.95


def test_equal_states_are_alike_and_never_more():
    x = jnp.asarray(draw(1, 200, 7, 9) * 10.0)
    same = np.asarray(flat_cosine(x, x))
    assert same.max() <= 1.0 and same.min() > 1 - 1e-6
    np.testing.assert_array_equal(flat_cosine(x, -x), -same)
    np.testing.assert_array_equal(flat_cosine(x, jnp.zeros_like(x)), np.zeros(200))
    assert not SaturationRule().step(x, x, None, jnp.float32(1.0))[1].any()
    assert SaturationRule().step(x, x, None, jnp.float32(1 - 1e-6))[1].all()


@pytest.mark.parametrize("theta", [-1.1, 0.5, 0.8, 0.9, 0.95, 1.0])
def test_leaves_at_the_first_layer_above_the_threshold(theta):
    plan = saturated(similarities(jnp.asarray(STATES), jnp.asarray(MASK)), jnp.float32(theta))
    wanted = [next((i for i in range(L - 1) if BRUTE[i, b] > theta), L - 1) for b in range(B)]
    np.testing.assert_array_equal(plan.exit, wanted)
    state, left = SaturationRule().start(jnp.asarray(STATES[0])), np.full(B, L - 1)
    for index in range(L - 1):
        new = jnp.asarray(STATES[index + 1])
        state, leave, _ = SaturationRule().step(state, new, jnp.asarray(MASK), jnp.float32(theta))
        left = np.where(np.asarray(leave) & (left == L - 1), index, left)
    np.testing.assert_array_equal(left, wanted)


def test_exits_move_with_the_threshold_and_the_brute_force_has_several():
    scores = similarities(jnp.asarray(STATES), jnp.asarray(MASK))
    exits = [np.asarray(saturated(scores, jnp.float32(t)).exit) for t in np.linspace(-1.01, 1, 60)]
    assert (np.diff(exits, axis=0) >= 0).all()
    assert (exits[0] == 0).all() and (exits[-1] == L - 1).all() and len(np.unique(exits)) >= 4


def test_decay_of_the_threshold(strict):
    theta, steps = jnp.float32(0.99), jnp.arange(20, dtype=jnp.int32)
    said = np.asarray(Decay().at(theta, steps, 20))
    hand = [min(1.0, max(0.0, 0.95 * 0.99 + 0.05 * np.exp(-t / 20))) for t in range(20)]
    np.testing.assert_allclose(said, hand, rtol=1e-6)
    assert (np.diff(said) < 0).all() and said[0] == pytest.approx(0.9905, abs=1e-6)
    assert Decay().at(jnp.float32(1.0), steps[:1], 20)[0] == 1.0
    assert Decay(beta=1.0).at(theta, steps, 20) == theta
    assert Decay().at(jnp.float32(5.0), steps[:1], 20)[0] == 1.0  # clipped
    with pytest.raises(DyncompError, match="0 <= beta"):
        Decay(beta=1.5)


def test_expected_time_reduction():
    words = np.asarray([[True, True], [True, False]])
    first = time_reduction(np.ones(2), np.ones((2, 2), int), words, (6, 6))
    assert first == pytest.approx(5 / 6)
    assert time_reduction(np.full(2, 6.0), np.full((2, 2), 6), words, (6, 6)) == 0.0
    # Decoder alone, at its first layer: the encoder is charged in full at every word.
    alone = time_reduction(np.full(2, 6.0), np.ones((2, 2), int), words, (6, 6))
    assert alone == pytest.approx(5 / 12)
    uneven = time_reduction(np.asarray([2.0, 4.0]), np.asarray([[1, 3], [2, 9]]), words, (4, 4))
    assert uneven == pytest.approx(1 - (2 + 1 + 2 + 3 + 4 + 2) / 24)
    joined = joined_layers(np.asarray([2, 6]), np.asarray([6, 1]), 9, np.asarray([3, 1]))
    np.testing.assert_allclose(joined, [3.0, 5.5])


def batch_of(layers):
    targets = np.random.default_rng(3).integers(0, 7, layers.shape[1:3]).astype(np.int32)
    mask = np.asarray([[1, 1, 1], [1, 0, 0]], np.float32)
    return {"targets": jnp.asarray(targets), "mask": jnp.asarray(mask)}


def test_layer_wise_loss_by_hand():
    layers = draw(2, 4, 2, 3, 7)
    batch = batch_of(layers)
    wide = layers.astype(np.float64)
    logp = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    own = np.take_along_axis(logp, np.asarray(batch["targets"])[None, ..., None], axis=-1)[..., 0]
    each = -(own * np.asarray(batch["mask"])).sum((1, 2)) / 4
    output = {"layers": jnp.asarray(layers), "final": jnp.asarray(layers[-1])}
    loss, found = LayerwiseObjective()(output, None, batch, 0)
    assert float(loss) == pytest.approx(each.mean(), rel=1e-5)
    total, _ = LayerwiseObjective(reduce="sum")(output, None, batch, 0)
    assert float(total) == pytest.approx(each.sum(), rel=1e-5)
    right = (layers[1].argmax(-1) == batch["targets"]) * np.asarray(batch["mask"])
    assert found["words_layer_1"].value() == pytest.approx(right.sum() / 4)
    # Only the last layer weighted: ordinary training.
    last, _ = LayerwiseObjective(weights="last")(output, None, batch, 0)
    assert float(last) == pytest.approx(each[-1], rel=1e-5)


def test_unknown_options_are_refused(unchecked):
    with pytest.raises(DyncompError, match="'uniform' or 'last'"):
        LayerwiseObjective(weights="first")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'mean' or 'sum'"):
        LayerwiseObjective(reduce="max")  # type: ignore[arg-type]
