"""The blocks as Linen modules: events, penalties, controls, prices; and without their libraries."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy.linalg import expm

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.models import ContinuousClassifier, ConvStem, DenseStem
from dyncomp.recurrent import (
    ConvField,
    EquilibriumBlock,
    FixedPoint,
    MLPField,
    ODEBlock,
    ODESolver,
    TanhCell,
    tolerance_for,
)

X = np.float32(np.random.default_rng(0).normal(size=(4, 3)))


def block(**options):
    options = {"augment": 1, "penalties": ("kinetic",), **options}
    return ODEBlock(functools.partial(MLPField, 5, gain=2.0), ODESolver(max_steps=64), **options)


@pytest.fixture(scope="module")
def made():
    """(variables, (variables, x, mask) -> (output, aux), the same in training, traces of the first)."""
    net = block(anneal_from=100.0, anneal_steps=2)
    variables = nn.meta.unbox(jax.jit(net.init)(jax.random.key(0), X))
    traces = []

    @jax.jit
    def run(v, x, mask):
        traces.append(1)
        return net.apply(v, x, mask, capture=("plan",))

    train = jax.jit(
        lambda v, x: net.apply(v, x, train=True, mutable=["controls"], capture=("plan",))
    )
    return variables, run, train, traces


def test_events_are_what_each_example_took(made):
    variables, run, _, _ = made
    y, aux = run(variables, X, np.float32([1, 1, 0, 1]))
    stats = aux.plans["solve"]
    assert y.shape == (4, 4) and stats.finished.all()
    runs, steps = aux.events["evaluations"], aux.events["attempts"]
    np.testing.assert_array_equal(
        steps.needed, (stats.accepted + stats.rejected) * np.array([1, 1, 0, 1])
    )
    np.testing.assert_array_equal(runs.needed, (6 * steps.needed + 1) * np.array([1, 1, 0, 1]))
    assert (runs.executed == 6 * (stats.accepted + stats.rejected).max() + 1).all()
    assert sorted(aux.events) == ["attempts", "evaluations"] and float(aux.losses["kinetic"]) == 0


def test_the_tolerance_is_an_argument_and_no_answer_is_not_a_number(made):
    variables, run, _, traces = made
    counts, ones = [], np.ones(4, np.float32)
    for tolerance in (1e-1, 1e-5, 1e-12):
        controls = {**variables["controls"], "tolerance": jnp.float32(tolerance)}
        y, aux = run({**variables, "controls": controls}, X, ones)
        counts.append(int(aux.events["evaluations"].needed.sum()))
    assert counts[0] < counts[1] and len(traces) == 1
    # 1e-12 is not to be had in float32: steps collapse and run out.
    assert not aux.plans["solve"].finished.any() and np.isnan(y).all()


def test_training_anneals_and_penalises(made):
    variables, _, train, _ = made
    needed, penalties, controls = [], [], variables["controls"]
    for _ in range(3):
        (_, aux), moved = train({**variables, "controls": controls}, X)
        controls = moved["controls"]
        needed.append(int(aux.plans["solve"].needed.sum()))
        penalties.append(float(aux.losses["kinetic"]))
        np.testing.assert_array_equal(
            aux.events["penalty"].needed, aux.events["evaluations"].needed
        )
    assert needed[0] <= needed[1] <= needed[2] and needed[0] < needed[2]
    assert float(controls["steps"]) == 3 and float(controls["tolerance"]) == np.float32(1e-3)
    assert penalties[2] > 0


def test_a_budget_gives_a_tolerance():
    """NFE = tolerance^(-1/5): a budget of 10 is met from 1e-5 on."""
    needed = lambda tolerance: tolerance**-0.2
    found = tolerance_for(needed, 10.0, steps=30)
    assert 1e-5 <= found < 1.001e-5 and needed(found) <= 10.0
    with pytest.raises(DyncompError, match="even tolerance 1 takes 1"):
        tolerance_for(needed, 0.5)


def test_prices_by_hand():
    """d = 3 + 1 zeros, hidden 5. Tsit5: 21 weights of stages and 7 of the error; FSAL needs none for the step."""
    table = block().cost((3,))
    flops = 2 * (4 * 5 + 5 * 4) + 4 * 5 + 4
    assert table["evaluations"].flops == flops
    assert table["attempts"].flops == (2 * (21 + 7) + 6) * 4
    assert table["penalty"] == Cost(2 * 4)
    both = block(penalties=("kinetic", "jacobian")).cost((3,))
    assert both["penalty"].flops == flops + 2 * 2 * 4
    conv = ConvField(hidden=2).cost((6, 5, 3))
    assert conv.flops == 30 * (2 * 9 * (4 * 2 + 3 * 3) + 10 * (3 + 2))
    cell = TanhCell(7).cost(3)
    assert cell["evaluations"].flops == 2 * 49 + 14 and cell["prepare"].flops == 2 * 21 + 7


def test_dense_costs_agree_with_xla():
    """XLA counts a product's multiply-adds as we do."""
    field = MLPField(64)
    t, z = jnp.zeros(8), jnp.zeros((8, 32))
    variables = jax.jit(field.init)(jax.random.key(0), t, z)
    counted = jax.jit(field.apply).lower(variables, t, z).compile().cost_analysis()["flops"]
    assert abs(counted / (8 * field.cost((32,)).flops) - 1) < 0.03


def test_the_conv_field_reads_time_and_is_linear_in_its_last_layer():
    field = ConvField(activation="tanh", gain=1.0)
    z = np.float32(np.random.default_rng(1).normal(size=(2, 4, 4, 3)))
    variables = nn.meta.unbox(jax.jit(field.init)(jax.random.key(0), np.zeros(2, np.float32), z))
    run = jax.jit(lambda v, t: field.apply(v, jnp.broadcast_to(t, (2,)), z))
    start, end = run(variables, np.float32(0)), run(variables, np.float32(1))
    assert start.shape == z.shape and np.abs(start - end).max() > 0.01
    doubled = {**variables["params"], "second": 2 * variables["params"]["second"]}
    np.testing.assert_allclose(run({"params": doubled}, np.float32(0)), 2 * start, rtol=1e-5)


class Linear(nn.Module):
    """f = A z, to compare with the exponential of A."""

    dtypes: object = None

    @nn.compact
    def __call__(self, t, z):
        return z @ self.param("matrix", nn.initializers.normal(1.0), (3, 3))

    def cost(self, shape):
        return Cost(18)


def test_the_block_solves_its_equation():
    net = ODEBlock(Linear, tolerance=1e-5, end=0.5)
    variables = jax.jit(net.init)(jax.random.key(0), X)
    y, _ = jax.jit(net.apply)(variables, X)
    matrix = np.asarray(variables["params"]["field"]["matrix"], np.float64)
    np.testing.assert_allclose(y, X @ expm(0.5 * matrix), atol=3e-5)


def classifier(core, stem):
    return ContinuousClassifier(classes=5, core=core, stem=stem)


def test_an_equilibrium_block_starts_warm_and_counts():
    x = np.float32(np.random.default_rng(2).normal(size=(6, 4, 4, 1)))
    core = functools.partial(EquilibriumBlock, functools.partial(TanhCell, 8), FixedPoint())
    net = classifier(core, functools.partial(DenseStem, 8))
    variables = nn.meta.unbox(jax.jit(net.init)(jax.random.key(0), x))
    run = jax.jit(lambda v, x, start: net.apply(v, x, start=start, capture=("plan",)))
    _, cold = run(variables, x, jnp.zeros((6, 8)))
    block, inner = EquilibriumBlock(functools.partial(TanhCell, 8)), variables["params"]
    given = {"params": inner["core"], "controls": {"tolerance": jnp.float32(1e-6)}}
    point, _ = jax.jit(block.apply)(given, DenseStem(8).apply({"params": inner["stem"]}, x))
    _, warm = run(variables, x + np.float32(0.01), point)
    needed = [aux.plans["core"]["solve"].needed for aux in (cold, warm)]
    assert (needed[1] < needed[0]).all()
    runs = cold.events["core"]["evaluations"]
    np.testing.assert_array_equal(runs.needed, needed[0] + 1)  # and once more, for the gradient
    assert int(runs.executed[0]) == int(needed[0].max()) + 1
    table = net.cost(x.shape)
    assert set(table["core"]) == set(cold.events["core"])
    assert (
        table["stem"]["images"].flops == 2 * 16 * 8
        and table["head"]["images"].flops == 2 * 8 * 5 + 8
    )


def test_maps_are_solved_and_averaged():
    x = np.float32(np.random.default_rng(2).normal(size=(2, 9, 8, 1)))
    core = functools.partial(ODEBlock, ConvField, ODESolver(solver="euler", steps=1))
    net = classifier(core, functools.partial(ConvStem, 4, halvings=2))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    logits, aux = jax.eval_shape(net.apply, variables, x)
    assert logits.shape == (2, 5) and aux.events["core"]["evaluations"].needed.shape == (2,)
    table = net.cost(x.shape)
    stem = 5 * 4 * 4 * (18 * 1 + 8) + 3 * 2 * 4 * (18 * 4 + 8)
    assert table["stem"]["images"].flops == stem
    assert table["core"]["evaluations"] == ConvField().cost((3, 2, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block(penalties=("speed",)), "penalty 'speed'"),
        (lambda: block(tolerance=0.0), "tolerance > 0"),
        (lambda: block(anneal_from=10.0), "go together"),
        (lambda: ODEBlock(MLPField(3)), "pass the factory"),
        (lambda: MLPField(3, activation="gelu"), "use one of tanh"),
        (lambda: EquilibriumBlock(tolerance=-1.0), "more than 0"),
    ],
)
def test_bad_options_are_refused(unchecked, make, message):
    with pytest.raises(DyncompError, match=message):
        make()


def test_without_diffrax_one_line_names_the_extra():
    code = """
import sys
sys.modules["diffrax"] = None  # as if it were not installed
import numpy as np
from dyncomp import models, recurrent, runtime
assert not [m for m in ("diffrax", "optimistix", "equinox") if sys.modules.get(m)]
try:
    recurrent.ODESolver()(lambda *a: a[3], {}, np.zeros((1, 0)), (np.ones((1, 1)), {}))
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DyncompError" in done.stdout and "pip install 'dyncomp[ode]'" in done.stdout, (
        done.stderr
    )
