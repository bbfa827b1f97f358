"""Neurons and the quantiser that they stand for, against closed forms and chain rules written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.recurrent import Neuron, fires, learned_step

THETA = 1.3


def run(neuron, currents, theta=THETA):
    """What is fired in float64, [t n]."""
    with jax.enable_x64(True):
        out = neuron.run(jnp.asarray(currents, "float64"), jnp.asarray(theta, "float64"))
        return np.asarray(out)


def test_a_constant_current_fires_as_often_as_the_closed_form_says():
    steps, x = 64, np.random.default_rng(0).uniform(-THETA, 2 * THETA, 500)
    fired = run(Neuron(), np.broadcast_to(x, (steps, 500)))
    assert set(np.unique(fired)) == {0.0, THETA}
    counts = np.cumsum(fired > 0, axis=0)
    t = np.arange(1, steps + 1)[:, None]
    level = t * x / THETA + 0.5
    clear = np.abs(level - np.round(level)) > 1e-9
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(counts[clear], np.clip(np.floor(level), 0, t)[clear])


def test_after_as_many_steps_as_levels_the_rate_is_the_quantised_activation():
    bits, scale = 2, 0.4
    x = np.random.default_rng(1).uniform(-1, 2, (50, 8)).astype(np.float32)
    top = 2**bits - 1
    rate = run(Neuron(), np.broadcast_to(x, (top, 50, 8)), top * scale).mean(axis=0)
    z = x.astype(np.float64) / scale
    clear = np.abs(z + 0.5 - np.round(z + 0.5)) > 1e-5
    quantised = np.asarray(learned_step(jnp.asarray(x), jnp.float32(scale), bits))
    np.testing.assert_allclose(rate[clear], quantised[clear], atol=1e-6)
    np.testing.assert_allclose(quantised, scale * np.clip(np.round(z), 0, top), atol=1e-6)


def test_a_tie_fires():
    # V_0 + I = theta / 2 + theta / 2 in binary fractions: >=, not >.
    assert run(Neuron(), [[0.5]], 1.0).tolist() == [[1.0]]


@pytest.mark.parametrize("leak", [1.0, 0.75])
def test_nothing_of_the_membrane_is_lost_but_by_the_leak(leak):
    currents = np.random.default_rng(2).normal(0.4, 1.0, (20, 30))
    neuron = Neuron(leak=leak)
    with jax.enable_x64(True):
        theta = jnp.asarray(THETA, "float64")
        v = neuron.begin((30,), theta)
        total = np.asarray(v)
        np.testing.assert_allclose(total, THETA / 2)
        for current in currents:
            v, out = neuron.step(v, jnp.asarray(current), theta)
            total = leak * total + current - np.asarray(out)
        np.testing.assert_allclose(np.asarray(v), total, atol=1e-12)


def test_leak_and_resets_by_hand():
    # leak 1/2, theta 1, current 0.75: V = .75; .375 + .75 = 1.125 fires. Soft: .125 stays, then .0625 + .75 = .8125,
    # 1.15625 fires. Hard: 0 stays, then .75, 1.125 fires.
    soft = Neuron(leak=0.5, start=0.0)
    hard = Neuron(leak=0.5, start=0.0, reset="hard")
    currents = np.asarray([0.75, 0.75, 0.75, 0.75, -0.5])[:, None]
    assert run(soft, currents, 1.0)[:, 0].tolist() == [0, 1, 0, 1, 0]
    assert run(hard, currents, 1.0)[:, 0].tolist() == [0, 1, 0, 1, 0]
    with jax.enable_x64(True):
        left = {}
        for name, neuron in (("soft", soft), ("hard", hard)):
            v, theta = jnp.zeros((1,), "float64"), jnp.asarray(1.0, "float64")
            for current in currents:
                v, _ = neuron.step(v, jnp.asarray(current), theta)
            left[name] = float(v[0])
    assert left == {"soft": 0.15625 / 2 - 0.5, "hard": -0.5}


def step_up(u, surrogate, width):
    """The smooth step whose derivative the surrogate is."""
    if surrogate == "arctan":
        return np.arctan(np.pi * u / width) / np.pi + 0.5
    inside = np.where(u < 0, 0.5 * (1 + u / width) ** 2, 1 - 0.5 * (1 - u / width) ** 2)
    return np.where(u <= -width, 0.0, np.where(u >= width, 1.0, inside))


@pytest.mark.parametrize("surrogate", ["triangle", "arctan"])
def test_the_surrogate_is_the_derivative_of_a_smooth_step(surrogate):
    width, h = 0.7, 1e-5
    u = np.random.default_rng(3).uniform(-2, 2, 40)
    wanted = (step_up(u + h, surrogate, width) - step_up(u - h, surrogate, width)) / (2 * h)
    found = jax.grad(lambda u: fires(u, surrogate, width).sum())(jnp.asarray(u, "float32"))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(fires(jnp.asarray(u, "float32")), (u >= 0).astype(np.float32))


def test_gradients_through_time_are_those_of_the_chain_rule():
    """d/dx and d/dtheta of a weighted sum of spikes, forward in numpy: do = h(u) du theta + 1[fired] dtheta."""
    leak, start, theta, x = 0.8, 0.25, 1.1, 0.55
    weights = np.random.default_rng(4).normal(size=7)
    v, by = start * theta, np.asarray([0.0, start])  # membrane and its derivative by (x, theta)
    want = np.zeros(2)
    for weight in weights:
        v, by = leak * v + x, leak * by + [1.0, 0.0]
        u = (v - theta) / theta
        du = np.asarray([by[0] / theta, by[1] / theta - v / theta**2])
        fired = float(u >= 0)
        out = theta * max(0.0, 1 - abs(u)) * du + [0.0, fired]
        want, v, by = want + weight * out, v - theta * fired, by - out

    def loss(x, theta):
        fired = Neuron(leak=leak, start=start).run(jnp.broadcast_to(x, (7, 1)), theta)
        return jnp.sum(jnp.asarray(weights) * fired[:, 0])

    with jax.enable_x64(True):
        found = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(theta))
    assert np.abs(want).min() > 1e-2
    np.testing.assert_allclose(found, want, rtol=1e-9)


def test_the_quantiser_has_the_gradients_of_its_definition():
    bits, scale, batch = 2, 0.5, 5
    rng = np.random.default_rng(5)
    x, g = rng.normal(0.4, 1.0, (batch, 3, 4)), rng.normal(size=(batch, 3, 4))
    of_x, of_scale = np.zeros_like(x), 0.0
    for place in np.ndindex(*x.shape):
        z = x[place] / scale
        if z >= 3:
            of_scale += g[place] * 3
        elif z > 0:
            of_x[place] = g[place]
            of_scale += g[place] * (round(z) - z)
    of_scale /= np.sqrt(batch * 3)
    loss = lambda x, s: jnp.sum(learned_step(x, s, bits) * jnp.asarray(g, "float32"))
    found = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x, "float32"), jnp.float32(scale))
    np.testing.assert_allclose(found[0], of_x, rtol=1e-6)
    np.testing.assert_allclose(found[1], of_scale, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"leak": 0.0}, {"reset": "none"}, {"surrogate": "box"}, {"width": 0.0}]
)
def test_options_that_do_not_exist_are_refused(wrong, unchecked):
    with pytest.raises(DyncompError, match="use"):
        Neuron(**wrong)
