"""Adaptive steps against diffrax, a counting callback and closed forms; float64."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm

from dyncomp.core.errors import DyncompError
from dyncomp.recurrent import RK4, TABLEAUS, ODESolver, StepControl, adaptive, equal_steps

END = 5.0
MU = np.array([0.5, 1.0, 3.0, 8.0, 0.0, 0.0, 0.0])
TOLERANCE = np.array([1e-5, 1e-5, 1e-5, 1e-5, 1e-3, 1e-6, 1e-9])
START = np.tile([2.0, 0.0], (7, 1))
CASES = {
    "tsit5": ("tsit5", StepControl()),
    "dopri5": (
        "dopri5",  # and a first step that is much too long
        StepControl(pcoeff=0.3, icoeff=0.4, dcoeff=0.05, first_step=3.0),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def doubles():
    jax.config.update("jax_enable_x64", True)  # for the threads of callbacks too
    yield
    jax.config.update("jax_enable_x64", False)


def slope(mu, z):
    return jnp.stack([z[:, 1], mu * (1 - z[:, 0] ** 2) * z[:, 1] - z[:, 0]], axis=1)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """What diffrax and our own step give, and how often f was really called."""
    solver, control = CASES[request.param]
    calls = []

    def counted(value):
        calls.append(1)
        return value

    def field(weights, mu, t, state):
        f = slope(mu, state[0])
        like = jax.ShapeDtypeStruct(f.shape, f.dtype)
        return jax.pure_callback(counted, like, f, vmap_method="expand_dims"), {}

    how = ODESolver(solver=solver, control=control, max_steps=4096)
    (z, _), stats = jax.device_get(how(field, {}, MU, (START, {}), TOLERANCE, 0.0, END))
    tableau, own = TABLEAUS[solver], lambda t, z: slope(MU, z)

    @jax.jit
    def loop():
        at = adaptive.begin(own, jnp.asarray(START), 0.0, END, control, TOLERANCE, 5)
        step = lambda at: adaptive.attempt(own, at, END, tableau, control, TOLERANCE)
        return jax.lax.while_loop(lambda at: ~jnp.all(adaptive.done(at, END)), step, at)

    at = jax.device_get(loop())
    needed = np.asarray(adaptive.evaluations(at, tableau, control))
    return z, stats, at, needed, len(calls), control


def test_our_step_and_diffrax_agree(case):
    z, stats, at, _, _, _ = case
    np.testing.assert_array_equal(at.accepted, stats.accepted)
    np.testing.assert_array_equal(at.rejected, stats.rejected)
    np.testing.assert_allclose(at.z, z, atol=1e-11)
    assert stats.finished.all() and stats.rejected.sum() > 10


def test_evaluations_are_those_of_a_counting_callback(case):
    _, stats, at, own, calls, control = case
    attempts = stats.accepted + stats.rejected
    np.testing.assert_array_equal(stats.needed, 6 * attempts + 1 + stats.again)
    np.testing.assert_array_equal(own, 6 * attempts + 1)  # slopes are kept over rejections
    # Under vmap the loop runs to the slowest, and stage 1 again where any example needs it.
    assert calls == stats.executed[0] == 6 * attempts.max() + 1 + stats.again.max()
    assert (stats.again.max() > 0) == (control.first_step == 3.0)


def test_tighter_tolerances_err_less_and_cost_no_less(case):
    z, stats, _, _, _, _ = case
    exact = [2 * np.cos(END), -2 * np.sin(END)]  # mu = 0 is a rotation
    errors = np.linalg.norm(z[4:] - exact, axis=1)
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert (np.diff(stats.needed[4:]) > 0).all()


@pytest.mark.parametrize("case", ["tsit5"], indirect=True)
def test_an_example_in_a_batch_is_solved_as_alone(case):
    z, stats, at, _, _, _ = case
    alone = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, mu: slope(mu, z[None])[0]), diffrax.Tsit5(), 0.0, END, None,
        jnp.asarray(START[2]), MU[2],
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5), max_steps=4096,
    )  # fmt: skip
    for one in (stats, at):
        assert int(one.accepted[2]) == int(alone.stats["num_accepted_steps"])
        assert int(one.rejected[2]) == int(alone.stats["num_rejected_steps"])
    np.testing.assert_allclose(z[2], alone.ys[0], atol=1e-12)
    np.testing.assert_allclose(at.z[2], alone.ys[0], atol=1e-12)


@functools.cache
def linear():
    @jax.jit
    def solve(matrices, z, end):
        f = lambda t, z: jnp.einsum("bij,bj->bi", matrices, z)
        control, table = StepControl(), TABLEAUS["tsit5"]
        at = adaptive.begin(f, z, 0.0, 1.0, control, 1e-8, 5)
        step = lambda at: adaptive.attempt(f, at, 1.0, table, control, 1e-8)
        return jax.lax.while_loop(lambda at: ~jnp.all(adaptive.done(at, 1.0)), step, at)

    return solve


MATRICES = np.array(
    [
        np.zeros((2, 2)),
        [[0.0, 2.0], [-2.0, 0.0]],
        [[-3.0, 0.0], [0.0, -3.0]],
        [[-1.0, 0.4], [0.2, 0.5]],
    ]
)


def test_no_slope_is_the_identity_in_three_growing_steps():
    start = np.array([[1.0, 2.0]] * 4)
    at = linear()(MATRICES, jnp.asarray(start), 1.0)
    np.testing.assert_array_equal(at.z[0], start[0])
    assert (
        int(at.accepted[0]) == 3 and int(at.rejected[0]) == 0
    )  # 0.01, then 0.1, then what is left
    for matrix, z in zip(MATRICES, at.z, strict=True):
        np.testing.assert_allclose(z, expm(matrix) @ start[0], atol=3e-7)


def test_time_runs_back_unless_it_dissipates():
    start = np.array([[1.0, 2.0]] * 4)
    end = linear()(MATRICES, jnp.asarray(start), 1.0).z
    end = end.at[2].add(1e-5)
    back = linear()(-MATRICES, end, 1.0).z
    np.testing.assert_allclose(back[1], start[1], atol=1e-6)  # a rotation
    # dz/dt = -3 z: whatever is wrong at the end is e^3 times as wrong at the start.
    np.testing.assert_allclose(back[2] - start[2], 1e-5 * np.exp(3.0), rtol=0.01)


def test_no_time_costs_no_step():
    field = lambda weights, given, t, state: (state[0] * 1e6, {})
    solver = ODESolver()
    (z, _), stats = solver(field, {}, np.zeros((2, 0)), (np.ones((2, 3)), {}), 1e-3, 0.0, 0.0)
    np.testing.assert_array_equal(z, 1.0)
    assert stats.needed.tolist() == stats.executed.tolist() == [0, 0]
    at = adaptive.begin(lambda t, z: z, jnp.ones((2, 3)), 0.0, 0.0, StepControl(), 1e-3, 5)
    assert bool(adaptive.done(at, 0.0).all()) and at.accepted.tolist() == [0, 0]


def test_an_estimated_first_step_is_hairers():
    """f = -2 z from z = 3 with rtol = atol = tol; every figure of the estimate by hand."""
    tol, order, z = 1e-4, 5, 3.0
    scale = tol + z * tol
    size, speed = z / scale, 6.0 / scale
    small = 0.01 * size / speed
    after = -2 * (z - small * 6.0)
    curve = abs(after + 6.0) / scale / small
    want = min(100 * small, (0.01 / max(speed, curve)) ** (1 / order))
    f, control = lambda t, z: -2.0 * z, StepControl(first_step=0.0)
    at = adaptive.begin(f, jnp.full((1, 1), z), 0.0, 9.0, control, tol, order)
    np.testing.assert_allclose(at.until, [want], rtol=1e-12)
    assert int(adaptive.evaluations(at, TABLEAUS["tsit5"], control)[0]) == 2


def test_euler_is_a_weight_tied_residual_network_bit_for_bit():
    weight = np.float32(np.random.default_rng(0).normal(size=(3, 3)))
    z = np.float32(np.random.default_rng(1).normal(size=(5, 3)))
    field = lambda w, given, t, state: (jnp.tanh(state[0] @ w), {})
    solver = ODESolver(solver="euler", steps=8)
    nothing = np.zeros((5, 0), np.float32)
    with jax.enable_x64(False):
        (solved, _), stats = jax.jit(lambda w, z: solver(field, w, nothing, (z, {})))(weight, z)

        @jax.jit
        def network(w, z):
            return jax.lax.fori_loop(0, 8, lambda _, z: z + jnp.tanh(z @ w) * np.float32(1 / 8), z)

        np.testing.assert_array_equal(solved, network(weight, z))
    assert stats.needed.tolist() == [8] * 5 == stats.executed.tolist()


def test_equal_steps_of_rk4_are_the_textbook_ones():
    """Each example with as many steps as it asks for; f = A z, so a step is the Taylor polynomial of degree 4."""
    a, z = np.array([[0.1, 1.0], [-1.0, 0.0]]), np.array([[1.0, 0.5]] * 2)
    found = equal_steps(lambda t, z: z @ a.T, jnp.asarray(z), 2.0, np.array([4, 10]), RK4)
    for n, row in zip((4, 10), found, strict=True):
        h = a * 2.0 / n
        step = np.eye(2) + h + h @ h / 2 + h @ h @ h / 6 + h @ h @ h @ h / 24
        np.testing.assert_allclose(row, np.linalg.matrix_power(step, n) @ z[0], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, "use one of euler, rk4, tsit5, dopri5"),
        ({"solver": "rk4"}, "set steps >= 1"),
        ({"adjoint": "forward"}, "use 'checkpoint'"),
        ({"adjoint": "reversible"}, "belong together"),
        ({"max_steps": 0}, "max_steps=0"),
    ],
)
def test_bad_options_are_refused(unchecked, options, message):
    with pytest.raises(DyncompError, match=message):
        ODESolver(**options)


def test_bad_controls_and_directions_are_refused():
    with pytest.raises(DyncompError, match="shrink < safety"):
        StepControl(safety=1.5)
    with pytest.raises(DyncompError, match="turn time round"):
        ODESolver()(lambda *a: None, {}, np.zeros((1, 0)), (np.ones((1, 1)), {}), 1e-3, 1.0, 0.0)


def test_every_tableau_meets_its_order_conditions():
    for table in TABLEAUS.values():
        a = np.zeros((len(table.b),) * 2)
        for n, row in enumerate(table.a, 1):
            a[n, : len(row)] = row
        b, c = np.array(table.b), np.array([0.0, *table.c])
        np.testing.assert_allclose(a.sum(1), c, atol=1e-12)
        for k in range(1, table.order + 1):  # quadrature, and its nested forms of order k
            np.testing.assert_allclose(b @ c ** (k - 1), 1 / k, atol=1e-12)
            if k > 1:
                np.testing.assert_allclose(b @ a @ c ** (k - 2), 1 / (k * (k - 1)), atol=1e-12)
        if table.error:
            low = b - np.array(table.error)
            for k in range(1, 5):
                np.testing.assert_allclose(low @ c ** (k - 1), 1 / k, atol=1e-6)
            assert abs(low @ c**4 - 1 / 5) > 1e-4  # order 4 and no more
