"""Labels, loss and decisions of the stop-and-exit controller, against the definitions spelled out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyncomp import depth
from dyncomp.core.errors import DyncompError
from dyncomp.depth import CONTINUE, EXIT, STOP

X, N = 4, 24
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def float32(values):
    return jnp.asarray(values, jnp.float32)


def test_labels_of_every_pattern():
    patterns = np.asarray(list(itertools.product([False, True], repeat=X))).T  # [x 16]
    labels = np.asarray(depth.decision_labels(jnp.asarray(patterns)))
    assert labels.dtype == np.int32
    for right, column in zip(patterns.T, labels.T, strict=True):
        if not right.any():
            wanted = [STOP] * X
        else:
            f = 1 + right.tolist().index(True)
            wanted = [CONTINUE] * (f - 1) + [EXIT] * (X - f + 1)
        assert column.tolist() == wanted


def test_correct_is_argmax_against_target():
    logits = float32(RNG.normal(size=(X, N, 6)))
    targets = jnp.asarray(RNG.integers(0, 6, N), jnp.int32)
    np.testing.assert_array_equal(
        depth.correct_at(logits, targets), np.asarray(logits).argmax(-1) == np.asarray(targets)
    )


def cross_entropy(logits, labels):
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("weighting", ["ordinal", "uniform"])
def test_loss_in_float64(weighting):
    logits, labels = RNG.normal(size=(X, N, 3)), RNG.integers(0, 3, (X, N))
    mask = RNG.integers(0, 2, N)
    per_exit = (cross_entropy(logits, labels) * mask).sum(1) / mask.sum()
    k = np.arange(1, X + 1) if weighting == "ordinal" else np.ones(X)
    args = (float32(logits), jnp.asarray(labels, jnp.int32), float32(mask))
    loss = lambda logits: depth.controller_loss(float32(logits), *args[1:], weighting=weighting)
    np.testing.assert_allclose(loss(args[0]), (k * per_exit).sum() / k.sum(), rtol=1e-5)
    check_grads(loss, (args[0],), order=1, modes=["rev"], eps=1e-2, rtol=2e-2)


def test_equal_losses_keep_their_value_at_any_depth():
    for exits in (1, 3, 12):
        logits, labels = jnp.zeros((exits, N, 3)), jnp.ones((exits, N), jnp.int32)
        np.testing.assert_allclose(depth.controller_loss(logits, labels), np.log(3), rtol=1e-6)


def test_unknown_weighting_is_refused(unchecked):
    with pytest.raises(DyncompError, match="weighting='deep'"):
        depth.controller_loss(jnp.zeros((1, 1, 3)), jnp.zeros((1, 1), jnp.int32), weighting="deep")


# decisions


def decided(p, tau_exit, tau_stop):
    """The inference rule, for one exit and token."""
    best = int(np.argmax(p))
    if best == STOP and p[STOP] > tau_stop:
        return STOP
    return EXIT if best == EXIT and p[EXIT] > tau_exit else CONTINUE


decide = jax.jit(depth.decision)


@pytest.mark.parametrize("tau_exit", [0.0, 0.6, 0.9, 100.0])
@pytest.mark.parametrize("tau_stop", [0.0, 0.6, 0.9, 100.0])
def test_decisions(tau_exit, tau_stop):
    logits = RNG.normal(size=(X, N, 3)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ours = np.asarray(decide(float32(logits), float32(tau_exit), float32(tau_stop)))
    wanted = [[decided(p[x, n], tau_exit, tau_stop) for n in range(N)] for x in range(X)]
    np.testing.assert_array_equal(ours, wanted)
    assert ours.dtype == np.int32


def test_threshold_alone_never_decides():
    """With tau = 0 every probability passes; only the argmax may act."""
    logits = float32([[[0.0, 0.1, 3.0]]])
    assert int(decide(logits, float32(0), float32(0))[0, 0]) == CONTINUE


def test_certain_probabilities_do_not_pass_one():
    logits = float32([[0.0, 200.0, 0.0], [200.0, 0.0, 0.0]])
    assert decide(logits, float32(1), float32(1)).tolist() == [CONTINUE] * 2
    assert decide(logits, float32(1), float32(0)).tolist() == [CONTINUE, STOP]


def test_walks_end_at_the_first_decision():
    for decisions in itertools.product([STOP, EXIT, CONTINUE], repeat=3):
        result = depth.walk(jnp.asarray(decisions, jnp.int32)[:, None])
        at = next((x for x, d in enumerate(decisions) if d != CONTINUE), 2)
        assert (int(result.exit[0]), bool(result.stopped[0])) == (at, decisions[at] == STOP)


def test_exits_move_with_their_threshold():
    """Teacher-forced, stop disabled: deeper or equal as tau_exit grows; more tokens stop as tau_stop falls."""
    logits, off = float32(RNG.normal(size=(X, N, 3)) * 3), float32(100)
    walks = [depth.walk(decide(logits, float32(t), off)) for t in (0.0, 0.5, 0.7, 0.9, 1.0)]
    exits = np.stack([w.exit for w in walks])
    assert (np.diff(exits, axis=0) >= 0).all() and (exits[0] < exits[-1]).any()
    assert not any(w.stopped.any() for w in walks) and (exits[-1] == X - 1).all()
    stops = [
        depth.walk(decide(logits, float32(0.5), float32(t))).stopped for t in (0.9, 0.7, 0.0, 100)
    ]
    assert (stops[0] <= stops[1]).all() and (stops[1] <= stops[2]).all() and not stops[3].any()
    assert stops[2].any()


def test_mean_layers_counts_the_first_token_in_full():
    layers = jnp.asarray([[1, 3, 6], [2, 12, 5]], jnp.int32)
    emitted = jnp.asarray([[True, True, True], [True, True, False]])
    assert float(depth.mean_layers(layers, emitted, 12)) == pytest.approx((12 + 3 + 6 + 24) / 5)
    assert float(depth.mean_layers(layers, jnp.zeros((2, 3), bool), 12)) == 0.0
