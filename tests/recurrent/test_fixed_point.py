"""Fixed points and their gradients against dense linear algebra, optimistix and a converged unroll; float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.recurrent import FixedPoint, TanhCell, adjoint, fixed_point, power_norm

rng = np.random.default_rng(0)
N = 6
WEIGHT = rng.normal(size=(N, N))
WEIGHT *= 0.8 / np.linalg.norm(WEIGHT, 2)
GIVEN = {"weight": WEIGHT, "injected": np.repeat(rng.normal(size=(2, N)), 2, axis=0)}
STARTS = np.concatenate([np.zeros((1, N)), rng.normal(size=(1, N))] * 2)  # two for each example
G = rng.normal(size=(4, N))


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def find(solver, tolerance=1e-10, step=TanhCell.step, given=GIVEN, start=STARTS, **options):
    f = lambda z: step(given, z)
    run = jax.jit(lambda z: fixed_point(f, z, tolerance, solver=solver, **options))
    return jax.device_get(run(jnp.asarray(start)))


@pytest.fixture(scope="module")
def found():
    with jax.enable_x64(True):
        names = ("iterate", "anderson", "broyden", "newton")
        return {name: find(name, max_steps=200) for name in names}


@pytest.mark.parametrize("solver", ["iterate", "anderson", "broyden", "newton"])
def test_the_point_does_not_depend_on_the_start(found, solver):
    z, stats = found[solver]
    np.testing.assert_allclose(z[0], z[1], atol=1e-9)
    np.testing.assert_allclose(z[2], z[3], atol=1e-9)
    image = np.tanh(z @ WEIGHT + GIVEN["injected"])
    left = np.linalg.norm(image - z, axis=1) / (1 + np.linalg.norm(image, axis=1))
    assert (left <= 1e-10).all() and stats.finished.all()
    np.testing.assert_allclose(stats.residual, left, atol=1e-14)
    assert (stats.executed == stats.needed.max()).all()


def test_optimistix_finds_the_same_points(found):
    theirs = optimistix.fixed_point(
        lambda z, x: jnp.tanh(z @ WEIGHT + x), optimistix.FixedPointIteration(1e-12, 1e-12),
        jnp.zeros(N), GIVEN["injected"][0], max_steps=500,
    )  # fmt: skip
    np.testing.assert_allclose(found["iterate"][0][0], theirs.value, atol=1e-9)


def test_quicker_solvers_need_fewer_evaluations(found):
    mean = {name: stats.needed.mean() for name, (_, stats) in found.items()}
    assert mean["anderson"] < mean["iterate"] and mean["broyden"] < mean["iterate"]


def test_iterations_grow_with_the_logarithm_of_the_tolerance():
    """f = J z with J = rho * orthogonal: the residual is exactly rho^k (1 + rho) up to the shrinking scale."""
    turn = np.linalg.qr(rng.normal(size=(N, N)))[0]
    start = 1e-3 * STARTS[1:2]
    step = lambda given, z: z @ given
    for rho in (0.5, 0.9):
        runs = [
            int(find("iterate", t, step, rho * turn, start, max_steps=900)[1].needed[0])
            for t in (1e-6, 1e-12)
        ]
        assert abs(runs[1] - runs[0] - np.log(1e6) / -np.log(rho)) < 1.5


def test_too_few_steps_are_said():
    z, stats = find("iterate", max_steps=3)
    assert not stats.finished.any() and stats.executed.tolist() == stats.needed.tolist() == [3] * 4
    assert (stats.residual > 1e-10).all()


def jacobian(z, x):
    """df/dz [N N] of z -> tanh(z W + x), rows for outputs."""
    return (1 - np.tanh(z @ WEIGHT + x) ** 2)[:, None] * WEIGHT.T


@pytest.mark.parametrize("backward", ["iterate", "anderson", "broyden", "gmres"])
def test_the_implicit_gradient_is_the_dense_formula(backward):
    z, _ = find("iterate", 1e-13, max_steps=400)
    how = FixedPoint(backward=backward, backward_steps=400)
    solve = jax.jit(lambda z: adjoint(TanhCell.step, GIVEN, z, jnp.asarray(G), 1e-12, how)[0])
    for v, point, x, g in zip(solve(z), z, GIVEN["injected"], G, strict=True):
        dense = np.linalg.solve(np.eye(N) - jacobian(point, x).T, g)
        np.testing.assert_allclose(v, dense, atol=1e-10)


@pytest.fixture(scope="module")
def gradients():
    with jax.enable_x64(True):
        found = {}
        for name in ("implicit", "one_step", "unroll"):
            how = FixedPoint(gradient=name, max_steps=300, backward_steps=300)
            loss = lambda given, how=how: jnp.sum(how(TanhCell.step, given, STARTS, 1e-10)[0] * G)
            found[name] = jax.device_get(jax.jit(jax.grad(loss))(GIVEN))
    return found


def test_implicit_gradients_equal_those_of_a_converged_unroll(gradients):
    for name in GIVEN:
        np.testing.assert_allclose(
            gradients["implicit"][name], gradients["unroll"][name], rtol=1e-6
        )


def test_one_step_keeps_the_incoming_gradient(gradients):
    """dL/dx = g (1 - z^2) for one step; for the exact one v takes the place of g."""
    z, _ = find("iterate", 1e-13, max_steps=400)
    np.testing.assert_allclose(gradients["one_step"]["injected"], G * (1 - z**2), atol=1e-8)
    assert np.abs(gradients["one_step"]["weight"] - gradients["implicit"]["weight"]).max() > 0.01


def test_the_spectral_norm():
    w = rng.normal(size=(5, 4))
    sigma, right = power_norm(jnp.asarray(w), jnp.ones(4), 200)
    np.testing.assert_allclose(sigma, np.linalg.svd(w)[1][0], rtol=1e-9)
    u, _, v = np.linalg.svd(w)
    slope = jax.grad(lambda w: power_norm(w, right, 5)[0])(jnp.asarray(w))
    np.testing.assert_allclose(slope, np.outer(u[:, 0], v[0]), atol=1e-6)  # d sigma / d w


@pytest.mark.parametrize("norm", ["svd", "power"])
def test_the_cell_contracts(norm):
    x = np.float32(rng.normal(size=(2, 3)))
    cell = TanhCell(8, bound=0.7, norm=norm, power_steps=40)
    variables = jax.jit(cell.init)(jax.random.key(0), x)
    weights = jax.tree.map(lambda w: 5 * w, variables)
    prepared = cell.apply(weights, x)
    assert np.linalg.norm(prepared["weight"], 2) < 0.7 * 1.02
    near = np.linalg.norm(prepared["weight"], 2) > 0.7 * 0.98
    assert near
    small = jax.tree.map(lambda w: 0.01 * w, variables)  # already below: untouched
    np.testing.assert_array_equal(
        cell.apply(small, x)["weight"], np.asarray(jax.tree.leaves(small["params"]["weight"])[0])
    )


def test_training_moves_the_vector_of_the_power_iteration():
    x = np.float32(rng.normal(size=(2, 3)))
    cell = TanhCell(8, norm="power")
    variables = jax.jit(cell.init)(jax.random.key(0), x)
    variables = {**variables, "params": jax.tree.map(lambda w: w + 0.3, variables["params"])}
    _, moved = cell.apply(variables, x, train=True, mutable=["controls"])
    before, after = variables["controls"]["right"], moved["controls"]["right"]
    w = np.asarray(jax.tree.leaves(variables["params"]["weight"])[0])
    assert np.linalg.norm(w @ after) > np.linalg.norm(w @ before) / np.linalg.norm(before)
    _, kept = cell.apply(variables, x, mutable=["controls"])
    np.testing.assert_array_equal(kept["controls"]["right"], before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedPoint(gradient="exact"), "use 'implicit'"),
        (lambda: FixedPoint(backward="cg"), "use 'iterate'"),
        (lambda: FixedPoint(solver="gmres"), "use one of iterate"),
        (lambda: FixedPoint(max_steps=0), "at least 1"),
        (lambda: TanhCell(4, bound=1.0), "0 < bound < 1"),
        (lambda: TanhCell(4, norm="l2"), "use 'svd' or 'power'"),
    ],
)
def test_bad_options_are_refused(unchecked, make, message):
    with pytest.raises(DyncompError, match=message):
        make()
