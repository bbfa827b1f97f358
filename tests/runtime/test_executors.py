"""Compacted execution against masked execution, and how much it ran."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost, Ledger
from dyncomp.exits import ConfidenceRule, ExitBank, GateRule
from dyncomp.experts import MLP
from dyncomp.models import Block, Group, VisionTransformer, layout
from dyncomp.models.exiting import ExitingClassifier
from dyncomp.runtime import HostExecutor, MaskedExecutor, Segment, Segmented, from_model
from dyncomp.runtime.buckets import launch_costs, powers_of_two, split

DEPTH = 4


def build(layers="unroll", rule=None):
    block = functools.partial(
        Block,
        mixer=functools.partial(Attention, heads=2, rope_theta=None, causal=False),
        ffn=functools.partial(MLP, hidden=16),
        norm="layer",
    )
    net = functools.partial(
        VisionTransformer,
        classes=3,
        patch=2,
        d_model=8,
        groups=(Group((block, block), 2),),
        layers=layers,
    )
    return ExitingClassifier(
        backbone=net, exits=ExitBank, rule=rule or ConfidenceRule(threshold=0.45)
    )


IMAGES = np.random.default_rng(0).normal(size=(22, 4, 4, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    found = nn.meta.unbox(jax.jit(build().init)(jax.random.key(0), IMAGES[:2]))
    # Larger heads, so that confidences differ.
    return jax.tree.map(lambda leaf: leaf, found) | {
        "params": jax.tree.map(lambda p: 2 * p, found["params"])
    }


def test_every_exit_is_used_and_compacted_equals_masked(variables):
    net = from_model(build(), variables, IMAGES.shape)
    net.thresholds[:] = [0.75, 0.7, 0.65]
    masked, host = MaskedExecutor(net)(IMAGES), HostExecutor(net, IMAGES, capacity=32)(IMAGES)
    assert len(set(np.asarray(masked.plan.exit).tolist())) >= 3
    np.testing.assert_array_equal(masked.plan.exit, host.plan.exit)
    np.testing.assert_allclose(masked.outputs, host.outputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(masked.needed, host.needed)
    assert (masked.executed == len(IMAGES)).all()
    assert (host.executed >= host.needed).all() and host.executed.sum() < masked.executed.sum()
    whole = build(layers="scan").apply(variables, IMAGES)[0]["logits"]
    wanted = np.asarray(whole)[np.asarray(host.plan.exit), np.arange(22)]
    np.testing.assert_allclose(host.outputs, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [GateRule(hazard=0.4), ConfidenceRule(threshold=0.7)])
def test_model_decides_as_the_executors_do(variables, rule):
    model = build(rule=rule)
    controls = {**variables["controls"], "thresholds": jnp.full((3,), rule.initial())}
    own = {**variables, "controls": controls}
    output, aux = layout.apply(model, own, IMAGES, capture=("plan",))
    host = HostExecutor(from_model(model, own, IMAGES.shape), IMAGES, capacity=22)(IMAGES)
    np.testing.assert_array_equal(output["exit"], host.plan.exit)
    np.testing.assert_allclose(output["emitted"], host.outputs, rtol=1e-4, atol=1e-5)
    ledger = Ledger(model.cost(IMAGES.shape)).record(aux.events)
    assert ledger.total("needed") == host.ledger.total("needed")
    np.testing.assert_allclose(aux.plans["exit"].scores[0, 0], host.plan.scores[0, 0], rtol=1e-5)


def test_gates_shut_is_the_backbone_bit_for_bit_and_open_leaves_at_once(variables):
    model, params = build("scan", GateRule()), variables["params"]
    gates = {"weight": jnp.zeros((3, 4)), "bias": jnp.zeros((3,))}

    def run(bias):
        shut = {
            **params,
            "bank": {**params["bank"], "gates": {**gates, "bias": gates["bias"] + bias}},
        }
        controls = {**variables["controls"], "thresholds": jnp.full((3,), 0.5)}
        return model.apply({"params": shut, "controls": controls}, IMAGES)[0]

    plain, _ = model.backbone().apply({"params": params["net"]}, IMAGES)
    never, always = run(-1e9), run(1e9)
    assert (np.asarray(never["exit"]) == DEPTH - 1).all() and (
        np.asarray(always["exit"]) == 0
    ).all()
    np.testing.assert_array_equal(never["emitted"], plain)


def test_costs_add_up_to_the_backbones_ledger(variables):
    model = build("scan")
    _, aux = model.backbone().apply({"params": variables["params"]["net"]}, IMAGES)
    backbone = Ledger(model.backbone().cost(IMAGES.shape)).record(aux.events).total()
    exits = sum(cost.flops for cost in ExitBank(exits=3, classes=3).cost(8).values()) * 3
    prices = [cost.flops for cost in model.cost(IMAGES.shape).values()]
    assert len(IMAGES) * (sum(prices) - exits) == backbone
    # Exit head by hand: 8 x 3 multiply-adds; gate 9c + 6.
    assert exits == 3 * (2 * 8 * 3 + 9 * 3 + 6)
    costs = model.cumulative_costs(IMAGES.shape)
    np.testing.assert_allclose(costs, np.cumsum(prices) / np.sum(prices))
    assert costs[-1] == 1.0


def test_deterministic_cost_is_the_mean_of_c_at_the_exits(variables):
    model = build("scan")
    output, aux = model.apply(variables, IMAGES)
    ledger = Ledger(model.cost(IMAGES.shape)).record(aux.events)
    share = ledger.total("needed") / ledger.total("executed")
    costs = np.asarray(model.cumulative_costs(IMAGES.shape))
    assert share == pytest.approx(costs[np.asarray(output["exit"])].mean(), rel=1e-9)
    np.testing.assert_allclose(output["costs"], costs, rtol=1e-6)


def test_thresholds_and_batch_sizes_do_not_recompile(variables):
    net = from_model(build(), variables, IMAGES.shape)
    host = HostExecutor(net, IMAGES, capacity=16, buckets=(1, 4, 16)).warm_up()
    programs = host.compilations
    assert programs == 3 * 3 < DEPTH * 3  # blocks between the first and the last share theirs
    for tau, batch in ((0.0, 1), (0.5, 7), (0.8, 16), (1.1, 5)):
        host.thresholds[:-1] = tau
        result = host(IMAGES[:batch])
        assert len(result.outputs) == batch
        if tau > 1:
            assert (np.asarray(result.plan.exit) == DEPTH - 1).all()
            np.testing.assert_array_equal(result.needed, [batch] * DEPTH)
    assert host.compilations == programs
    with pytest.raises(DyncompError, match=r"1\.\.16"):
        host(IMAGES)


def test_hand_written_segments():
    """Adds 1 until a limit: each example leaves when it reaches its threshold."""

    def run(weights, carry, threshold):
        total = carry + weights
        return total, total * 10.0, total >= threshold, total

    parts = [Segment(run, jnp.float32(1.0), Cost(5)) for _ in range(6)]
    net = Segmented(lambda w, x: x, None, parts, [3.0] * 6)
    inputs = np.asarray([0.0, 2.0, 1.0, -9.0, 1.5], np.float32)
    host = HostExecutor(net, inputs, capacity=8)(inputs)
    np.testing.assert_array_equal(host.plan.exit, [2, 0, 1, 5, 1])
    np.testing.assert_array_equal(host.outputs, [30.0, 30.0, 30.0, -30.0, 35.0])
    np.testing.assert_array_equal(host.needed, [5, 4, 2, 1, 1, 1])
    assert host.ledger.total("needed") == 14 * 5
    np.testing.assert_array_equal(MaskedExecutor(net)(inputs).plan.exit, host.plan.exit)


def test_split_uses_existing_buckets_before_padding():
    buckets = powers_of_two(64)
    costs = launch_costs(buckets)
    assert split(22, buckets, costs) == (16, 8)
    assert [split(rows, buckets, costs) for rows in (64, 1, 0)] == [(64,), (1,), ()]
    for rows in range(1, 100):
        chosen = split(rows, buckets, costs)
        # Brute force over one, two and three launches.
        options = [(a, b, c) for a in (0, *buckets) for b in (0, *buckets) for c in buckets]
        fits = [o for o in options if sum(o) >= rows]
        price = lambda sizes: sum(size + 4 for size in sizes if size)
        assert sum(chosen) >= rows and price(chosen) <= min(map(price, fits), default=np.inf)
    assert powers_of_two(12) == (1, 2, 4, 8, 12)
    assert split(3, (1, 2, 4), (1.0, 1.5, 4.0)) == (2, 1)  # as measured, not as counted


def test_wrong_descriptions_are_refused(variables):
    with pytest.raises(DyncompError, match="unroll"):
        from_model(build("scan"), variables, IMAGES.shape)
    with pytest.raises(DyncompError, match="one threshold"):
        Segmented(lambda w, x: x, None, [Segment(lambda *a: a, None)] * 3, [0.5])
