import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.experts import MoE, SwiGLU
from dyncomp.routers import TopK, TopP

E, B, T, D, F = 4, 2, 9, 6, 5
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


def make(p=0.4, **options):
    moe = MoE(router=functools.partial(TopP, p=p), num_experts=E, hidden=F, **options)
    variables = jax.tree.map(lambda a: a, jax.jit(moe.init)(jax.random.key(0), X))
    variables = nn.unbox(variables)
    variables["params"]["router"]["kernel"] *= 60
    return moe, variables


def mixture(variables, gates):
    """sum_i gates_i E_i(x) in float64; gates [n e]."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    x, y = np.asarray(X, np.float64).reshape(-1, D), 0
    for e in range(E):
        g = x @ p["gate"][e]
        y += gates[:, e : e + 1] * ((g / (1 + np.exp(-g)) * (x @ p["up"][e])) @ p["down"][e])
    return y.reshape(B, T, D)


def probabilities(variables):
    z = np.asarray(X, np.float64).reshape(-1, D) @ np.asarray(
        variables["params"]["router"]["kernel"], np.float64
    )
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("dispatch", ["dropless", "mask", "gather"])
def test_p_one_is_the_mixture_and_p_zero_top_one_with_gate_p_max(dispatch):
    moe, variables = make(p=1.0, dispatch=dispatch)
    gates = probabilities(variables)
    np.testing.assert_allclose(moe.apply(variables, X)[0], mixture(variables, gates), atol=1e-4)
    zero = {**variables, "controls": {"router": {"p": jnp.float32(0)}}}
    top = np.where(gates == gates.max(axis=1, keepdims=True), gates, 0)
    np.testing.assert_allclose(moe.apply(zero, X)[0], mixture(variables, top), atol=1e-4)


def test_permuting_experts_changes_nothing():
    moe, variables = make()
    order = np.array([2, 0, 3, 1])
    params = {k: v[order] for k, v in variables["params"].items() if k != "router"}
    params["router"] = {"kernel": variables["params"]["router"]["kernel"][:, order]}
    permuted = moe.apply({**variables, "params": params}, X)[0]
    np.testing.assert_allclose(permuted, moe.apply(variables, X)[0], atol=1e-5)


def test_unselected_experts_get_no_gradient_but_router_columns_do():
    moe, variables = make(p=0.0)
    one = X[:1, :1]
    loss = lambda params: jnp.sum(moe.apply({**variables, "params": params}, one)[0])
    _, aux = moe.apply(variables, one, capture=("plan",))
    chosen = int(aux.plans["route"].experts[0, 0])
    variables["params"]["router"]["kernel"] /= 60
    grads = jax.grad(loss)(variables["params"])
    rest = [e for e in range(E) if e != chosen]
    for name in ("gate", "up", "down"):
        assert (np.asarray(grads[name])[rest] == 0).all() and (
            np.asarray(grads[name])[chosen] != 0
        ).any()
    assert (np.abs(np.asarray(grads["router"]["kernel"])[:, rest]).max(axis=0) > 0).all()


def test_events_of_padding_and_cost_keys():
    moe, variables = make()
    mask = jnp.asarray(np.arange(B * T).reshape(B, T) < 11, jnp.float32)
    y, aux = moe.apply(variables, X, mask, capture=("plan",))
    assert (np.asarray(y).reshape(-1, D)[11:] == 0).all()
    assert int(aux.events["router"]["rows"].needed) == 11
    assert int(aux.events["router"]["rows"].executed) == B * T
    rows = aux.events["experts"]["rows"]
    assert int(rows.needed) == int(np.asarray(aux.plans["route"].keep).reshape(-1, E)[:11].sum())
    assert int(rows.executed) >= int(rows.needed)
    assert moe.apply(variables, X, mask)[1].plans == {}
    assert moe.cost(D)["experts"]["rows"].flops == 6 * D * F


def test_one_expert_with_gate_one_is_dense():
    moe = MoE(router=functools.partial(TopK, k=1), num_experts=1, hidden=F)
    variables = nn.unbox(jax.jit(moe.init)(jax.random.key(0), X))
    params = {k: variables["params"][k][0] for k in ("gate", "up", "down")}
    dense, _ = SwiGLU(hidden=F).apply({"params": params}, X)
    np.testing.assert_allclose(moe.apply(variables, X)[0], dense, atol=1e-6)


def test_bad_options():
    with pytest.raises(DyncompError, match="factory"):
        MoE(router=TopK(num_experts=E), num_experts=E, hidden=F).init(jax.random.key(0), X)
