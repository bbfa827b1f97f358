"""Probes, rule and losses against numbers worked out by hand, in numpy, or by finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from dyncomp.core.errors import DyncompError
from dyncomp.diffusion import CertaintyProbes, CertaintyRule, DenoisingObjective, certainty_target
from dyncomp.diffusion.certainty import certainty_errors, layer_weights, weighted_layers
from dyncomp.exits import decide
from dyncomp.exits.rules import ExitRule

X, B, S = 3, 4, (2, 2, 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def problem():
    inner, noise = draw(0, X, B, *S), draw(1, B, *S)
    certainty = 1 / (1 + np.exp(-draw(2, X, B, *S)))
    return jnp.asarray(inner), jnp.asarray(noise), jnp.asarray(certainty)


def test_target_limits():
    noise = jnp.asarray(draw(3, B, *S))
    target = certainty_target(jnp.stack([noise, noise + 50.0, noise - 0.5]), noise)
    np.testing.assert_array_equal(target[0], 1.0)
    np.testing.assert_allclose(target[1], 0.0, atol=1e-6)
    np.testing.assert_allclose(target[2], 1 - np.tanh(0.5), rtol=1e-5)


def test_losses_against_numpy(problem):
    inner, noise, certainty = (np.asarray(a, np.float64) for a in problem)
    mask = np.asarray([1.0, 1.0, 0.0, 1.0])
    real = mask.astype(bool)
    error = (inner - noise) ** 2
    v, e = certainty[:, real], error[:, real]
    target = 1 - np.tanh(np.abs(inner - noise))
    l_u = ((certainty - target) ** 2)[:, real].mean(axis=(1, 2, 3, 4))
    w = v.mean(axis=(1, 2, 3, 4))
    wanted = {
        "official": (w / w.sum() * e.mean(axis=(1, 2, 3, 4))).sum(),
        "paper": (v * e).mean(axis=(1, 2, 3, 4)).sum(),
        "uniform": e.mean(),
    }
    output = dict(zip(("inner", "noise", "certainty"), problem, strict=True))
    batch = {"mask": jnp.asarray(mask, jnp.float32)}
    for weighting, layers in wanted.items():
        for over, fold in (("mean", np.mean), ("sum", np.sum)):
            objective = DenoisingObjective(
                certainty_weight=0.5, layers_weight=2.0, weighting=weighting, over_layers=over
            )
            loss, metrics = objective(output, None, batch, 0)
            total = e[-1].mean() + 0.5 * fold(l_u) + 2.0 * layers
            np.testing.assert_allclose(loss, total, rtol=1e-5)
            np.testing.assert_allclose(metrics["simple"].value(), e[-1].mean(), rtol=1e-5)
    plain = DenoisingObjective(certainty_weight=0.0, layers_weight=0.0)
    loss, metrics = plain(output, None, batch, 0)
    np.testing.assert_allclose(loss, e[-1].mean(), rtol=1e-5)
    assert list(metrics) == ["simple"]


def test_weights_sum_to_one_and_equal_certainty_is_the_mean(problem):
    inner, noise, certainty = problem
    mask = jnp.ones((B,))
    np.testing.assert_allclose(jnp.sum(layer_weights(certainty, mask)), 1.0, rtol=1e-6)
    equal = jnp.full_like(certainty, 0.3)
    found = weighted_layers(equal, inner, noise, mask, "official")
    np.testing.assert_allclose(found, np.mean((inner - noise) ** 2), rtol=1e-5)


def test_gradients(problem):
    inner, noise, certainty = problem
    mask = jnp.ones((B,))
    layers = lambda v, g, weighting="official": weighted_layers(v, g, noise, mask, weighting)
    for weighting in ("official", "paper"):
        f = jax.jit(functools.partial(layers, weighting=weighting))
        check_grads(f, (certainty, inner), order=1, modes=["rev"], eps=1e-2, rtol=2e-2)
    # What reaches the predictions is as if the weights were numbers.
    own = jax.grad(layers, argnums=1)(certainty, inner)
    held = np.asarray(layer_weights(certainty, mask))
    wanted = held[:, None, None, None, None] * 2 * (np.asarray(inner) - np.asarray(noise))
    np.testing.assert_allclose(own, wanted / np.prod((B, *S)), rtol=1e-5, atol=1e-7)
    # The probes get nothing through held weights, and nothing reaches a prediction through L_u.
    output = {"inner": inner, "noise": noise}
    through = lambda detach: jax.grad(
        lambda v: DenoisingObjective(detach_weights=detach).layers({**output, "certainty": v}, mask)
    )(certainty)
    assert np.all(np.asarray(through(True)) == 0) and np.any(np.asarray(through(False)) != 0)
    l_u = lambda g: jnp.sum(certainty_errors(certainty, g, noise))
    assert np.all(np.asarray(jax.grad(l_u)(inner)) == 0)


def test_probes():
    tokens, times = jnp.asarray(draw(4, X, B, 5, 6)), jnp.asarray(draw(5, B, 6))
    probes = CertaintyProbes(exits=X, outputs=4)
    params = nn.meta.unbox(jax.jit(probes.init)(jax.random.key(0), tokens, times))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == X * 4 * (6 + 1)
    params = jax.tree.map(lambda p: p + 0.1, params)
    found = np.asarray(probes.apply({"params": params}, tokens, times))
    one = probes.apply({"params": params}, tokens[1], times, 1)
    np.testing.assert_allclose(found[1], one, rtol=1e-6)
    raw = np.asarray(tokens)[2] @ np.asarray(params["kernel"])[2] + np.asarray(params["bias"])[2]
    np.testing.assert_allclose(found[2], 1 / (1 + np.exp(-raw)), rtol=1e-5)
    total = lambda tokens: jnp.sum(probes.apply({"params": params}, tokens, times))
    assert np.all(np.asarray(jax.grad(total)(tokens)) == 0)
    assert probes.cost(6).flops == 2 * 6 * 4
    beside = CertaintyProbes(exits=X, outputs=4, time="concatenated")
    params = nn.meta.unbox(jax.jit(beside.init)(jax.random.key(0), tokens, times))["params"]
    assert params["kernel"].shape == (X, 12, 4) and beside.cost(6).flops == 2 * 12 * 4
    early, late = (np.asarray(beside.apply({"params": params}, tokens, t)) for t in (times, -times))
    gap = 2 * np.asarray(times) @ np.asarray(params["kernel"])[0, 6:]
    logit = lambda v: np.log(v / (1 - v))
    np.testing.assert_allclose((logit(early) - logit(late))[0, :, 0], gap, rtol=1e-2, atol=1e-4)


MEANS = np.float32([[0.5, 0.9, 0.2], [0.7, 0.1, 0.2], [0.9, 0.9, 0.2], [0.1, 0.6, 0.8]])  # [y b]


@pytest.mark.parametrize(
    ("rule", "tau", "exits"),
    [
        (CertaintyRule(), 0.6, [1, 0, 3]),
        (CertaintyRule(), 0.9, [4, 4, 4]),  # strictly above
        (CertaintyRule(), 1.0, [4, 4, 4]),
        (CertaintyRule(), 0.0, [0, 0, 0]),
        (CertaintyRule(patience=2, patient_exits=3), 0.0, [1, 1, 1]),
        # The second image crosses at exits 0 and 2: crossings need not be successive. The third crosses once, late.
        (CertaintyRule(patience=2, patient_exits=3), 0.6, [2, 2, 3]),
        (CertaintyRule(patience=2, patient_exits=4), 0.6, [2, 2, 4]),
    ],
)
def test_rule(rule, tau, exits):
    rows = jnp.zeros((4, 3, 2))
    plan = decide(rule, rows, jnp.asarray(MEANS), jnp.full((4,), tau, jnp.float32))
    assert plan.exit.tolist() == exits
    assert isinstance(rule, ExitRule)


def test_exit_layers_do_not_fall_with_the_threshold():
    means = jnp.asarray(np.random.default_rng(6).uniform(size=(6, 50)).astype(np.float32))
    rows = jnp.zeros((6, 50, 1))
    taus = np.linspace(0, 1, 21)
    for rule in (CertaintyRule(), CertaintyRule(patience=2, patient_exits=3)):
        exits = [decide(rule, rows, means, jnp.full((6,), t, jnp.float32)).exit for t in taus]
        assert (np.diff(np.stack(exits), axis=0) >= 0).all()
        assert len(np.unique(np.stack(exits))) > 3


def test_bad_options(unchecked):
    for make in (
        lambda: CertaintyProbes(exits=1, outputs=1, time="none"),
        lambda: CertaintyProbes(exits=0, outputs=1),
        lambda: CertaintyRule(patience=0),
        lambda: DenoisingObjective(weighting="code"),
        lambda: DenoisingObjective(over_layers="max"),
        lambda: DenoisingObjective(certainty_weight=-1.0),
    ):
        with pytest.raises(DyncompError, match="use"):
            make()
