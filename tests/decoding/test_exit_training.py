"""Exit maps: the closed form against a solver, distillation, what thresholds save, the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import models
from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    Confident,
    ExitAndCatchUp,
    ExitMaps,
    ExitScores,
    ExitStates,
    Generator,
    MappedHead,
    Sampler,
    distill,
    least_squares,
    read_states,
    score_exits,
)
from dyncomp.decoding.exit_training import divergence
from dyncomp.decoding.net import Net, separate

EXITS = (2, 4)


@pytest.fixture(scope="module")
def read(lm):
    """(net, what it read of random text)."""
    net = Net(*separate(*lm[:2]))
    windows = np.random.default_rng(0).integers(0, 61, (40, 18)).astype(np.int32)
    return net, windows, read_states(net, EXITS, windows, batch=4)


def test_states_are_the_blocks_outputs_and_targets_the_next_tokens(read, lm):
    net, windows, found = read
    assert found.states.shape == (3, 40 * 16, 32)
    logits, _ = models.apply(*lm[:2], jnp.asarray(windows))
    own = net.classify(jnp.asarray(found.states[-1])[None])[0].reshape(40, 16, -1)
    np.testing.assert_allclose(own, logits[:, 1:-1], atol=1e-4)
    assert (found.targets.reshape(40, 16) == windows[:, 2:]).all()
    position = jnp.arange(18)[None]
    x = net.embed(jnp.asarray(windows[:1]), position)
    for index in range(2):
        x, *_ = net.block(index, x, position, jnp.ones((1, 18), bool), None)
    np.testing.assert_allclose(found.states[0, :16], x[0, 1:-1], atol=1e-5)


def test_the_start_recovers_a_linear_map():
    rng = np.random.default_rng(1)
    x, change = rng.normal(size=(400, 8)), rng.normal(size=(8, 8))
    x *= np.sqrt(8) / np.linalg.norm(x, axis=1, keepdims=True)
    y = x @ change
    unit = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True))
    states = np.stack([3.0 * x, 5.0 * y]).astype(np.float32)
    own = least_squares(ExitStates((1,), states, np.zeros(400, np.int32)), ridge=0.0).maps[0]
    right = np.linalg.lstsq(x, unit, rcond=None)[0] - np.eye(8)
    np.testing.assert_allclose(own, right, atol=1e-4)


def test_distillation_lowers_the_divergence_it_says_and_touches_only_maps(read):
    net, _, found = read
    before = jax.tree.map(np.array, net.variables)
    start = ExitMaps(EXITS, jnp.zeros((2, 32, 32)))
    losses = []
    maps = distill(
        net, start, found, epochs=8, batch=64, learning_rate=3e-3, done=lambda x: losses.append(x)
    )
    assert len(losses) == 80 and losses[0].shape == (2,)
    assert (np.mean(losses[-10:], axis=0) < 0.6 * losses[0]).all()
    raw, own = score_exits(net, found), score_exits(net, found, maps)
    assert (own.agreement()[:-1] > raw.agreement()[:-1]).all()
    assert (own.best[-1] == raw.best[-1]).all() and own.agreement()[-1] == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, before, net.variables))
    assert not np.any(start.maps)
    first = np.random.default_rng(0).permutation(640)[:64]
    *early, teacher = net.classify(jnp.asarray(found.states[:, first]))
    exact = [float(divergence(teacher, student)) for student in early]
    np.testing.assert_allclose(losses[0], exact, rtol=1e-4)


def test_divergence_is_zero_only_for_the_same_distribution():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    right = float(np.sum(p * np.log(p / q)))
    assert float(divergence(jnp.log(p)[None] + 3, jnp.log(q)[None])) == pytest.approx(right)
    assert float(divergence(jnp.log(p)[None] + 3, jnp.log(p)[None])) == pytest.approx(0, abs=1e-6)


def test_scores_are_what_the_readout_says_and_decoding_does(read, lm):
    net, windows, found = read
    maps = ExitMaps(EXITS, 0.1 * jax.random.normal(jax.random.key(2), (2, 32, 32)))
    scores = score_exits(net, found, maps, batch=100)
    own = Net(net.model, maps.variables(net.variables))
    for exit in range(2):
        x = jnp.asarray(found.states[exit, :50])[:, None]
        likely = jax.nn.log_softmax(MappedHead().logits(own, exit, x))
        np.testing.assert_allclose(
            scores.nats[exit, :50], -likely[np.arange(50), found.targets[:50]], atol=1e-4
        )
        np.testing.assert_allclose(scores.confidence[exit, :50], np.exp(likely.max(1)), atol=1e-5)
    policy = ExitAndCatchUp(EXITS, MappedHead(), Confident())
    generator = Generator(lm[0], maps.variables(lm[1]), policy, Sampler(temperature=2.0))
    middle = float(np.quantile(scores.confidence[:2], 0.8))
    (one,) = generator.generate([[1, 2, 3]], 20, controls=np.full(2, middle, np.float32))
    text = np.array([[1, 2, 3, *one.tokens]], np.int32)
    again = score_exits(net, read_states(net, EXITS, text, batch=1), maps)
    sure = np.vstack([again.confidence[:2] >= middle, np.ones((1, 21), bool)])
    depths = np.array([2, 4, 6])[np.argmax(sure, axis=0)]
    # Row n of the scores speaks after token n + 1; the prompt's own three tokens and the first drawn run all blocks.
    assert one.depths[1:] == depths[2:].tolist() and len(set(one.depths[1:])) > 1


def test_what_a_threshold_saves_by_hand():
    best = np.array([[7, 7, 1, 1], [2, 7, 7, 1], [2, 7, 3, 4]])
    confidence = np.array([[0.9, 0.1, 0.6, 0.2], [0.2, 0.95, 0.3, 0.1], [0, 0, 0, 0]])
    scores = ExitScores((2, 4, 6), np.zeros((3, 4)), best, confidence)
    found = scores.leaving(0.5)
    assert found.blocks == (2 + 4 + 2 + 6) / 4 and found.heads == (1 + 2 + 1 + 3) / 4
    assert found.agreement == 0.5 and found.shares.tolist() == [0.5, 0.25, 0.25]
    alone = scores.leaving(0.5, exits=(4,))
    assert alone.blocks == (6 + 4 + 6 + 6) / 4 and alone.heads == (2 + 1 + 2 + 2) / 4
    assert alone.agreement == 1
    assert scores.agreement().tolist() == [0.25, 0.5, 1]


def test_a_file_keeps_the_maps_and_refuses_others(tmp_path, lm):
    maps = ExitMaps((2, 10), jax.random.normal(jax.random.key(0), (2, 32, 32)))
    maps.save(tmp_path / "maps")
    found = ExitMaps.load(tmp_path / "maps")
    assert found.exits == (2, 10) and np.array_equal(found.maps, maps.maps)
    with pytest.raises(DyncompError, match="from 1 to 5"):
        found.check(lm[0])
    with pytest.raises(DyncompError, match="width of 8"):
        ExitMaps((1,), jnp.zeros((1, 8, 8))).check(lm[0])
    (tmp_path / "damaged").write_bytes((tmp_path / "maps").read_bytes()[:-4])
    with pytest.raises(DyncompError, match="damaged"):
        ExitMaps.load(tmp_path / "damaged")


def test_errors_name_the_fix(read):
    net, windows, found = read
    with pytest.raises(DyncompError, match="from 1 to 5"):
        read_states(net, (6,), windows)
    with pytest.raises(DyncompError, match="at least 4"):
        read_states(net, EXITS, windows[:3])
    with pytest.raises(DyncompError, match="give more text"):
        distill(net, ExitMaps(EXITS, jnp.zeros((2, 32, 32))), found, batch=1000)
