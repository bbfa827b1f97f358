"""Experts without a network: the properties of MoE++ (arXiv 2410.07348), against values derived by hand."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.experts import FreeExperts, MoE, SwiGLU
from dyncomp.experts.capacity import heterogeneous_slots, slots_per_expert, tutel_slots
from dyncomp.routers import TopK

E, B, T, D, F = 4, 2, 8, 6, 5
KINDS = ("constant", "copy", "zero")  # experts 4, 5 and 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
RELEASED = functools.partial(TopK, k=2, logit_std=1.0, null_experts=1)
PAPER = functools.partial(TopK, k=2, renormalize=False)


def forced(router, chosen, **options):
    """A mixture whose first input is 1 and whose router reads only it: ``chosen`` experts get logits 3 and 2."""
    moe = MoE(router=router, num_experts=E, hidden=F, free=KINDS, **options)
    variables = nn.unbox(jax.jit(moe.init)(jax.random.key(0), X))
    kernel = np.zeros((D, E + 3), np.float32)
    kernel[0, chosen[0]], kernel[0, chosen[1]] = 3.0, 2.0
    variables["params"]["router"]["kernel"] = jnp.asarray(kernel)
    x = X.at[..., 0].set(1.0)
    logits = kernel[0]
    return moe, variables, x, np.exp(logits) / np.exp(logits).sum()


def network(variables, x, index):
    params = {k: variables["params"][k][index] for k in ("gate", "up", "down")}
    return SwiGLU(hidden=F).apply({"params": params}, x)[0]


def test_zero_leaves_the_whole_gate_to_the_network_by_the_released_rule():
    moe, variables, x, _ = forced(RELEASED, (6, 2))
    np.testing.assert_allclose(moe.apply(variables, x)[0], network(variables, x, 2), atol=1e-5)


def test_zero_takes_its_share_by_the_printed_rule():
    moe, variables, x, p = forced(PAPER, (6, 2))
    expected = p[2] * network(variables, x, 2)
    np.testing.assert_allclose(moe.apply(variables, x)[0], expected, atol=1e-5)


def test_copy_and_zero_return_the_input_or_its_share():
    moe, variables, x, _ = forced(RELEASED, (5, 6))
    y, aux = moe.apply(variables, x)
    np.testing.assert_allclose(y, x, atol=1e-6)
    assert int(aux.events["experts"]["rows"].needed) == 0
    moe, variables, x, p = forced(PAPER, (5, 6))
    np.testing.assert_allclose(moe.apply(variables, x)[0], p[5] * x, atol=1e-6)


def test_constant_without_mixing_weights_is_the_mean_of_input_and_vector():
    free = FreeExperts(KINDS, first=0)
    rows = X.reshape(-1, D)
    plan = TopK(num_experts=3, k=1)
    variables = nn.unbox(jax.jit(plan.init)(jax.random.key(0), rows))
    variables["params"]["kernel"] = jnp.zeros((D, 3)).at[0, 0].set(50.0)
    rows = rows.at[:, 0].set(1.0)
    route, _ = plan.apply(variables, rows)
    own = nn.unbox(jax.jit(free.init)(jax.random.key(1), rows, route))
    own["params"]["mix_0"] = jnp.zeros((D, 2))
    y = free.apply(own, rows, route)
    expected = (np.asarray(rows) + np.asarray(own["params"]["value_0"])) / 2
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_without_free_experts_and_residual_it_is_top_2():
    moe = MoE(router=functools.partial(TopK, k=2, residual=True), num_experts=E, hidden=F)
    plain = MoE(router=functools.partial(TopK, k=2), num_experts=E, hidden=F)
    variables = nn.unbox(jax.jit(moe.init)(jax.random.key(0), X))
    variables["params"]["router"]["residual"]["kernel"] = jnp.zeros((E, E))
    below = {"router_logits": jnp.ones((B, T, E))}
    y, aux = moe.apply(variables, X, below=below)
    params = {**variables["params"], "router": {"kernel": variables["params"]["router"]["kernel"]}}
    np.testing.assert_allclose(y, plain.apply({"params": params}, X)[0], atol=1e-6)
    assert aux.below["router_logits"].shape == (B, T, E)


def test_what_is_handed_up_is_the_whole_logits_before_rescaling():
    router = functools.partial(TopK, k=2, residual=True, logit_std=1.0)
    moe = MoE(router=router, num_experts=E, hidden=F)
    variables = nn.unbox(jax.jit(moe.init)(jax.random.key(0), X))
    below = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, E)), jnp.float32)
    _, aux = moe.apply(variables, X, below={"router_logits": below})
    params = variables["params"]["router"]
    expected = X @ params["kernel"] + below @ params["residual"]["kernel"]
    np.testing.assert_allclose(aux.below["router_logits"], expected, rtol=1e-4, atol=1e-5)
    scaled = {**params, "kernel": 3 * params["kernel"]}
    again = {"params": {**variables["params"], "router": scaled}}
    y, _ = moe.apply(variables, X, below={"router_logits": below})
    z, more = moe.apply(again, X, below={"router_logits": 3 * below})
    np.testing.assert_allclose(y, z, atol=1e-4)  # routing and gates do not see the scale
    np.testing.assert_allclose(more.below["router_logits"], 3 * expected, rtol=1e-4, atol=1e-5)


def test_the_gates_above_reach_the_router_below_only_through_the_residual():
    router = functools.partial(TopK, k=2, residual=True)
    moe = MoE(router=router, num_experts=E, hidden=F)
    first = nn.unbox(jax.jit(moe.init)(jax.random.key(0), X))
    second = nn.unbox(jax.jit(moe.init)(jax.random.key(1), X))

    def loss(kernel, residual):
        params = {**first["params"], "router": {**first["params"]["router"], "kernel": kernel}}
        _, aux = moe.apply({"params": params}, X)
        top = {**second["params"]["router"], "residual": {"kernel": residual}}
        y, _ = moe.apply({"params": {**second["params"], "router": top}}, X, below=aux.below)
        return jnp.sum(jnp.sin(y))

    kernel = first["params"]["router"]["kernel"]
    grad = jax.grad(loss)
    assert (np.asarray(grad(kernel, jnp.zeros((E, E)))) == 0).all()
    assert (np.asarray(grad(kernel, jnp.eye(E))) != 0).any()


@pytest.mark.parametrize("dispatch", ["dropless", "mask", "gather", "capacity"])
def test_every_dispatch_agrees_and_counts_only_networks(dispatch):
    options = {"capacity_factor": 50.0} if dispatch == "capacity" else {}
    moe = MoE(router=RELEASED, num_experts=E, hidden=F, free=KINDS, dispatch=dispatch, **options)
    reference = MoE(router=RELEASED, num_experts=E, hidden=F, free=KINDS, dispatch="mask")
    variables = nn.unbox(jax.jit(reference.init)(jax.random.key(0), X))
    variables["params"]["router"]["kernel"] *= 50
    y, aux = moe.apply(variables, X, capture=("plan",))
    np.testing.assert_allclose(y, reference.apply(variables, X)[0], atol=1e-5)
    load = np.asarray(aux.plans["load"])
    assert int(aux.events["experts"]["rows"].needed) == load[:E].sum() and load.sum() == 2 * B * T
    assert set(aux.events) == set(moe.cost(D))


def test_capacities_sum_to_factor_times_assignments_and_drop_free_experts_too():
    tau, factor, assignments = 0.75, 1.1, 8000
    slots = heterogeneous_slots(assignments, (tau,) * 8 + (1.0,) * 4, factor)
    assert abs(sum(slots) - factor * assignments) <= 12  # rounded up, each
    np.testing.assert_allclose(slots[0], factor * tau * assignments / (tau * 8 + 4), atol=1)
    moe, variables, x, _ = forced(RELEASED, (5, 2), dispatch="capacity", capacity_factor=0.5)
    y, aux = moe.apply(variables, x)
    own = heterogeneous_slots(2 * B * T, (1.0,) * 7, 0.5)[0]  # 3 of 16 rows each
    assert int(aux.events["dropped"]["rows"].needed) == 2 * (B * T - own)
    assert (np.asarray(y).reshape(-1, D)[own:] == 0).all()


@pytest.mark.parametrize(
    "rule, expected",
    [
        (slots_per_expert(1024, 32, 2, 1.05, multiple=4), 68),  # V-MoE: ceil(67.2) = 68
        (
            slots_per_expert(1000, 8, 2, 2.5, counts_k=False, rounding="nearest"),
            312,
        ),  # 312.5, to even
        (slots_per_expert(3, 8, 1, 1.0), 1),
        (tutel_slots(8, 4, 1, 1.25, 8), 2),  # int(1.25 * 2)
        (tutel_slots(8, 4, 2, 1.25, 8), 4),  # 2 int(.), not int(2 .)
        (tutel_slots(8, 4, 1, 0.3, 8), 1),  # int(0.6) = 0 would drop everything
        (tutel_slots(8, 4, 1, 0.0, 5), 5),
        (tutel_slots(8, 4, 1, -1.0, 5), 2),
        (tutel_slots(8, 4, 1, 0.0, 5, multiple=4), 8),
    ],
)
def test_capacity_formulas(rule, expected):
    assert rule == expected


def test_unknown_kinds_are_refused():
    moe = MoE(router=RELEASED, num_experts=E, hidden=F, free=("constant", "zero"))
    assert moe.total == 6
    with pytest.raises((DyncompError, TypeError)):
        MoE(
            router=RELEASED, num_experts=E, hidden=F, dispatch="capacity", capacity_factor=-1.0
        ).init(jax.random.key(0), X)
