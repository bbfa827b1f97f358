import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core import choose, dispatch
from dyncomp.core.errors import DyncompError
from dyncomp.experts import SwiGLUBank

N, D, F, E = 13, 4, 5, 4


def draw():
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return array(N, E), array(N, D), SwiGLUBank(array(E, D, F), array(E, D, F), array(E, F, D))


def run(name, plan, x, bank):
    extra = (N,) if name == "capacity" else ()
    return getattr(dispatch, name)(plan, x, bank, E, *extra)


def by_hand(plan, x, bank):
    x, gate, up, down = (np.asarray(a, np.float64) for a in (x, bank.gate, bank.up, bank.down))
    y = np.zeros_like(x)
    for i in range(N):
        for e, w, keep in zip(plan.experts[i], plan.weights[i], plan.keep[i], strict=True):
            if keep:
                g = x[i] @ gate[e]
                y[i] += float(w) * ((g / (1 + np.exp(-g)) * (x[i] @ up[e])) @ down[e])
    return y


@pytest.mark.parametrize("name", ["mask", "gather", "capacity", "dropless"])
def test_all_dispatches_agree_in_value_and_gradient(name):
    logits, x, bank = draw()

    def loss(name, logits, x, bank):
        plan = choose.top_p(jax.nn.softmax(logits), jnp.float32(0.5))
        y, stats = run(name, plan, x, bank)
        return jnp.sum(jnp.sin(y)), (y, stats, plan)

    grad = jax.jit(jax.grad(loss, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    ours, (y, stats, plan) = grad(name, logits, x, bank)
    reference, _ = grad("mask", logits, x, bank)
    np.testing.assert_allclose(y, by_hand(plan, x, bank), rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert int(stats.dropped) == 0 and int(stats.executed) >= int(plan.keep.sum())


@pytest.mark.parametrize("name", ["mask", "gather", "capacity", "dropless"])
def test_gradient_to_the_weights_is_the_directional_derivative(name):
    logits, x, bank = draw()
    plan = choose.top_k(jax.nn.softmax(logits), 2)
    loss = jax.jit(lambda w: jnp.sum(run(name, plan.replace(weights=w), x, bank)[0]))
    grad = jax.grad(loss)(plan.weights)
    one = np.zeros_like(plan.weights)
    one[3, 1] = 1  # the output is linear in the weights, so a unit step is exact
    np.testing.assert_allclose(grad[3, 1], loss(plan.weights + one) - loss(plan.weights), rtol=1e-3)


def test_capacity_counts_and_drops_the_last_rows():
    _, x, bank = draw()
    plan = choose.top_k(jnp.tile(jnp.array([[0.7, 0.1, 0.1, 0.1]]), (N, 1)), 1)
    y, stats = dispatch.capacity(plan, x, bank, E, 5)
    assert int(stats.dropped) == N - 5 and int(stats.executed) == E * 5
    expected = by_hand(plan, x, bank)
    expected[5:] = 0
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_gather_rows_changes_only_the_kept():
    _, x, _ = draw()
    plan = choose.keep_top(x[:, 0], 3)
    y = dispatch.gather_rows(plan, x, lambda rows: rows * 2)
    expected = np.array(x)
    for i in np.argsort(-np.asarray(x[:, 0]))[:3]:
        expected[i] *= 1 + 2 * x[i, 0]
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_cond_decides_once():
    double, same = (lambda x: 2 * x), (lambda x: x)
    x = jnp.ones(3)
    fn = jax.jit(lambda p: dispatch.cond(p, double, same, x))
    assert fn(jnp.array(True))[0] == 2 and fn(jnp.array(False))[0] == 1
    with pytest.raises(DyncompError, match="vmap"):
        jax.vmap(lambda p: dispatch.cond(p, double, same, x))(jnp.ones(3, bool))
