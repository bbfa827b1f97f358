"""Adjoints against finite differences and closed forms; penalties against quadrature; float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.linalg import expm

from dyncomp.core.errors import DyncompError
from dyncomp.recurrent import ODESolver, penalised, reversible_heun

rng = np.random.default_rng(0)
WEIGHTS = {"in": rng.normal(size=(2, 3)), "out": rng.normal(size=(3, 2))}
Z = rng.normal(size=(3, 2))


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def field(weights, given, t, state):
    return jnp.tanh(state[0] @ weights["in"] + t[:, None]) @ weights["out"], {}


def loss(solver, tolerance):
    def of(weights, z):
        nothing = jnp.zeros((len(z), 0))
        (end, _), _ = solver(field, weights, nothing, (z, {}), tolerance, 0.0, 1.0)
        return jnp.sum(end**2 * jnp.array([1.0, -2.0]))

    return of


@pytest.fixture(scope="module")
def gradients():
    """By adjoint; the solves are tight, so what is left is the adjoint's own error."""
    found = {}
    with jax.enable_x64(True):
        for adjoint in ("checkpoint", "seminorm"):
            of = loss(ODESolver(adjoint=adjoint), 1e-8)
            found[adjoint] = jax.device_get(jax.jit(jax.grad(of, argnums=(0, 1)))(WEIGHTS, Z))
    return found


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_checkpointed_gradients_equal_finite_differences(gradients):
    of = jax.jit(loss(ODESolver(), 1e-10))
    grads, step = gradients["checkpoint"], 1e-5
    for (name, i, j), want in (
        (("in", 0, 1), grads[0]["in"][0, 1]),
        (("out", 2, 0), grads[0]["out"][2, 0]),
    ):
        up, down = ({k: v.copy() for k, v in WEIGHTS.items()} for _ in range(2))
        up[name][i, j] += step
        down[name][i, j] -= step
        difference = (of(up, Z) - of(down, Z)) / (2 * step)
        np.testing.assert_allclose(want, difference, rtol=1e-6)
    up, down = Z.copy(), Z.copy()
    up[1, 0] += step
    down[1, 0] -= step
    difference = (of(WEIGHTS, up) - of(WEIGHTS, down)) / (2 * step)
    np.testing.assert_allclose(grads[1][1, 0], difference, rtol=1e-6)


def test_solving_the_adjoint_backwards_agrees_within_tolerance(gradients):
    found, exact = flat(gradients["seminorm"]), flat(gradients["checkpoint"])
    np.testing.assert_allclose(found, exact, atol=2e-6)
    assert (found != exact).any()


def test_reversible_heun_has_the_gradient_of_its_own_steps():
    """Against plain differentiation of the recursion, written here once more; and it converges with order 2."""
    f = lambda w, t, z: jnp.tanh(z @ w["in"] + t) @ w["out"]

    def plain(w, z, n):
        h, shadow, slope = 1.0 / n, z, f(w, 0.0, z)
        for i in range(n):
            after = 2 * z - shadow + h * slope
            new = f(w, (i + 1) * h, after)
            z, shadow, slope = z + h / 2 * (slope + new), after, new
        return z

    ours = jax.jit(lambda w, z: reversible_heun(f, w, z, 0.0, 1.0, 6))
    np.testing.assert_allclose(ours(WEIGHTS, Z), plain(WEIGHTS, Z, 6), rtol=1e-12)
    square = lambda run: lambda w, z: jnp.sum(run(w, z) ** 2)
    mine = jax.jit(jax.grad(square(ours), argnums=(0, 1)))(WEIGHTS, Z)
    theirs = jax.jit(jax.grad(square(lambda w, z: plain(w, z, 6)), argnums=(0, 1)))(WEIGHTS, Z)
    np.testing.assert_allclose(flat(mine), flat(theirs), rtol=1e-9)
    solver = ODESolver(solver="reversible_heun", adjoint="reversible", steps=6)
    (end, _), stats = solver(field, WEIGHTS, np.zeros((3, 0)), (Z, {}))
    np.testing.assert_allclose(end, plain(WEIGHTS, Z, 6), rtol=1e-12)
    assert stats.needed.tolist() == [7] * 3
    decay = lambda w, t, z: -z
    errors = [
        abs(float(reversible_heun(decay, {}, jnp.ones((1,)), 0.0, 1.0, n)[0]) - np.exp(-1))
        for n in (10, 40)
    ]
    assert 12 < errors[0] / errors[1] < 20  # a quarter of the step, a sixteenth of the error


def test_penalties_are_integrals_along_the_solution():
    """f = A z + t c: all integrands in closed form, integrated by quadrature."""
    a, c = np.array([[0.3, 1.0], [-1.0, -0.2]]), np.array([0.5, -1.0])
    noise = np.array([[1.0, -1.0]])
    f = penalised(lambda w, t, z: z @ w.T + t[:, None] * c, ("kinetic", "jacobian", "acceleration"))
    extras = {name: np.zeros(1) for name in ("kinetic", "jacobian", "acceleration")}
    (_, found), _ = ODESolver()(f, a, noise, (Z[:1], extras), 1e-9)
    inverse = np.linalg.inv(a)

    def at(t):  # variation of constants: z' = A z + t c
        particular = -(inverse @ c * t + inverse @ inverse @ c)
        return expm(a * t) @ (Z[0] + inverse @ inverse @ c) + particular

    slope = lambda t: a @ at(t) + t * c
    kinetic = quad(lambda t: np.sum(slope(t) ** 2) / 2, 0, 1)[0]
    second = quad(lambda t: np.sum((a @ slope(t) + c) ** 2) / 2, 0, 1)[0]
    np.testing.assert_allclose(found["kinetic"], kinetic, rtol=1e-6)
    np.testing.assert_allclose(found["jacobian"], np.sum((a.T @ noise[0]) ** 2) / 2, rtol=1e-6)
    np.testing.assert_allclose(found["acceleration"], second, rtol=1e-6)
    with pytest.raises(DyncompError, match="penalty 'speed'"):
        penalised(f, ("speed",))


def test_one_step_size_for_a_batch_couples_its_examples():
    """A still example beside a fast one takes the fast one's steps."""
    f = lambda w, rate, t, state: (jnp.stack([state[0][:, 1], -state[0][:, 0]], 1) * rate, {})
    start, rate = np.array([[1.0, 0.0]] * 2), np.array([[0.01], [20.0]])
    (_, _), each = ODESolver()(f, {}, rate, (start, {}), 1e-5)
    (z, _), one = ODESolver(shared=True)(f, {}, rate, (start, {}), 1e-5)
    assert each.needed[0] < each.needed[1] / 3
    assert one.needed[0] == one.needed[1] == one.executed[0] > 2 * each.needed[0]
    np.testing.assert_allclose(z[1], [np.cos(20), -np.sin(20)], atol=1e-3)
