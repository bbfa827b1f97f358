"""Solves as segments: the same answers and counts under every executor, and fewer rows where it compacts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.models import ContinuousClassifier, DenseStem
from dyncomp.recurrent import EquilibriumBlock, MLPField, ODEBlock, ODESolver
from dyncomp.runtime import (
    CompactExecutor,
    HostExecutor,
    LaxExecutor,
    MaskedExecutor,
    fixed_point_segments,
    from_continuous,
    ode_segments,
)

RATES = np.float32([0.0, 0.1, 1.0, 8.0, 0.5, 20.0])
END = 1.0
START = np.stack([np.ones(6, np.float32), np.zeros(6, np.float32), RATES], axis=1)


def turning(weights, t, z):
    """A rotation at a rate that each example brings along; the rate itself stands still."""
    x, y, rate = z[:, 0], z[:, 1], z[:, 2]
    return jnp.stack([-weights * rate * y, weights * rate * x, jnp.zeros_like(x)], axis=1)


def segments(**options):
    options = {"tolerance": 1e-4, "attempts": 2, "max_steps": 63, **options}
    return ode_segments(turning, jnp.float32(1.0), (3,), **options)


@pytest.fixture(scope="module")
def runs():
    parts = segments(prices=(Cost(1), Cost(100), Cost(10), Cost(5)))
    host = HostExecutor(parts.net, START, capacity=6, buckets=(2, 6))
    made = {
        "host": host,
        "compact": CompactExecutor(parts.net, (2,)),
        "lax": LaxExecutor(parts.net),
    }
    made["masked"] = MaskedExecutor(parts.net)
    return parts, made, {name: run(START) for name, run in made.items()}


def test_all_executors_agree_and_are_right(runs):
    parts, _, found = runs
    masked = parts.read(found["masked"])
    exact = np.stack([np.cos(RATES), np.sin(RATES)], axis=1)
    np.testing.assert_allclose(masked.outputs[:, :2], exact, atol=0.05)
    for name in ("host", "compact", "lax"):
        other = parts.read(found[name])
        np.testing.assert_array_equal(found[name].visits, found["masked"].visits)
        np.testing.assert_array_equal(found[name].exits, found["masked"].exits)
        np.testing.assert_array_equal(other.needed, masked.needed)
        np.testing.assert_allclose(other.outputs, masked.outputs, atol=1e-5)
        assert other.finished.all()


def test_easy_examples_do_not_pay_for_stiff_ones(runs):
    parts, _, found = runs
    needed = parts.read(found["host"]).needed
    assert needed[5] > 4 * needed[0] and needed[0] == 6 * 3 + 1  # 0.01, 0.1, the rest
    # Two attempts a trip: what the host ran are everyone's trips, in buckets of 2 and 6 rows.
    trips = -(-(needed - 1) // 12)
    np.testing.assert_array_equal(found["host"].visits[:, 1], trips)
    ran = {name: parts.read(one).executed for name, one in found.items()}
    alone = trips.sum() * 12 + 6
    assert alone <= ran["host"] < 1.6 * alone
    assert ran["lax"] == 6 * (trips.max() * 12 + 1) > 2 * ran["host"]
    assert ran["masked"] == 6 * 32 * (12 + 1)  # every segment in every sweep


def test_the_ledger_prices_every_part(runs):
    _, _, found = runs
    trips = int(found["host"].visits[:, 1].sum())
    want = 6 * (1 + 100) + trips * (12 * 100 + 2 * 10) + 6 * 5
    assert found["host"].ledger.total("needed") == want


def test_the_tolerance_is_an_argument(runs):
    parts, made, found = runs
    host, before = made["host"], made["host"].compilations
    host.thresholds[:] = 1e-2
    assert parts.read(host(START)).needed[5] < parts.read(found["host"]).needed[5]
    host.thresholds[:] = 1e-9  # not to be had in float32: 32 trips of two attempts, then the end
    short = parts.read(host(START))
    assert not short.finished[5] and short.needed[5] == 1 + 32 * 2 * 6 and short.finished[0]
    host.thresholds[:] = 1e-4
    assert host.compilations == before


def test_fixed_points_leave_when_they_are_found():
    """z -> a z + 1 has the point 1/(1 - a)."""
    rates = np.float32([[0.0], [0.5], [0.9]])
    parts = fixed_point_segments(
        lambda weights, a, z: a * z + weights, jnp.float32(1.0), (1,), tolerance=1e-5, max_steps=200, iterations=2,
        before=lambda weights, a: (a, jnp.zeros_like(a)),
    )  # fmt: skip
    answers = [parts.read(run(rates)) for run in (
        HostExecutor(parts.net, rates, capacity=3, buckets=(1, 3)), MaskedExecutor(parts.net)
    )]  # fmt: skip
    for found in answers:
        np.testing.assert_allclose(found.outputs, 1 / (1 - rates), rtol=1e-3)
        assert found.finished.all() and found.needed[0] == 2
    np.testing.assert_array_equal(answers[0].needed, answers[1].needed)
    # The residual of z_k = (1 - a^k)/(1 - a) is a^k / (1 + z_(k+1)).
    a, k = 0.9, answers[0].needed[2] - 1
    left = lambda k: a**k / (1 + (1 - a ** (k + 1)) / (1 - a))
    assert left(k) <= 1e-5 * 1.01 and left(k - 1) > 1e-5 * 0.99


@pytest.fixture(scope="module")
def classifier():
    x = np.float32(np.random.default_rng(0).normal(size=(5, 4, 4, 1)) * 3)
    core = functools.partial(
        ODEBlock, functools.partial(MLPField, 8, gain=4.0), ODESolver(max_steps=64), augment=1
    )
    net = ContinuousClassifier(classes=3, core=core, stem=functools.partial(DenseStem, 6))
    return net, nn.meta.unbox(jax.jit(net.init)(jax.random.key(0), x)), x


def test_a_classifier_gives_its_logits_segment_by_segment(classifier):
    net, variables, x = classifier
    parts = from_continuous(net, variables, x.shape)
    logits, aux = net.apply(variables, x, capture=("plan",))
    masked = MaskedExecutor(parts.net)(x)
    host = HostExecutor(parts.net, x, capacity=5, buckets=(5,))(x)
    np.testing.assert_array_equal(host.visits, masked.visits)
    np.testing.assert_allclose(host.outputs, masked.outputs, atol=1e-5)
    # Against diffrax in float32 the errors of small steps are rounding, so later steps differ a little.
    np.testing.assert_allclose(parts.read(host).outputs, logits, atol=2e-2)
    assert (
        abs(int(parts.read(host).needed.sum()) - int(aux.plans["core"]["solve"].needed.sum())) <= 12
    )
    prices, needed = net.cost(x.shape), parts.read(host).needed
    core, trips = prices["core"], int(host.visits[:, 1].sum())
    fixed = prices["stem"]["images"] + prices["head"]["images"] + core["evaluations"]
    want = 5 * fixed.flops + trips * (6 * core["evaluations"].flops + core["attempts"].flops)
    assert host.ledger.total("needed") == want and needed.sum() == 5 + 6 * trips


def test_what_is_no_adaptive_block_is_refused(classifier, unchecked):
    net, variables, x = classifier
    fixed = net.clone(
        core=functools.partial(ODEBlock, functools.partial(MLPField, 8), ODESolver(steps=4))
    )
    deq = net.clone(core=EquilibriumBlock)
    for other in (fixed, deq):
        with pytest.raises(DyncompError, match="adaptive steps"):
            from_continuous(other, variables, x.shape)
    with pytest.raises(DyncompError, match="use tsit5 or dopri5"):
        segments(solver="rk4")
