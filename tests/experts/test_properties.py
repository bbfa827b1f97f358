"""Properties of the layer over shapes, k, ties, padding, extreme logits and number formats."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp import routers
from dyncomp.core import choose, dispatch
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.experts import MLPBank, MoE, SwiGLUBank

D, F = 6, 5
RNG = np.random.default_rng(0)
E = 4
ARRAYS = [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((E, D, F), (E, D, F), (E, F, D))]
BANK = SwiGLUBank(*ARRAYS)
ROUTERS = {
    "top_k": functools.partial(routers.TopK, k=2),
    "all": functools.partial(routers.TopK, k=E),
    "switch": routers.Switch,
    "top_p": functools.partial(routers.TopP, p=0.5),
    "threshold": functools.partial(routers.Threshold, theta=0.3),
    "sigmoid": functools.partial(routers.SigmoidTopK, k=2),
    "relu": routers.ReLU,
    "choice": functools.partial(routers.ExpertChoice, capacity_factor=1.5),
    "cosine": functools.partial(routers.TopK, k=2, scorer="cosine"),
    "random": routers.Random,
    "hash": functools.partial(routers.Hash, k=2),
    "annealed": routers.Annealed,
}
X = jnp.asarray(RNG.normal(size=(2, 10, D)), jnp.float32)
MASK = jnp.asarray(np.arange(20).reshape(2, 10) % 10 < 7, jnp.float32)


def made(router, dispatch_="dropless", **options):
    moe = MoE(router=router, num_experts=E, hidden=F, dispatch=dispatch_, **options)
    key = {"params": jax.random.key(0), "router": jax.random.key(1)}
    variables = nn.unbox(jax.jit(moe.init)(key, X))
    params = dict(variables["params"])
    if "router" in params and "kernel" in params["router"]:
        params["router"] = {**params["router"], "kernel": params["router"]["kernel"] * 40}
    return moe, {**variables, "params": params}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_takes_every_dispatch(name):
    results = {}
    for dispatch_ in ("mask", "dropless", "gather", "capacity"):
        options = {"capacity_factor": 100.0} if dispatch_ == "capacity" else {}
        moe, variables = made(ROUTERS[name], dispatch_, **options)

        def loss(params, moe=moe, variables=variables):
            y, aux = moe.apply({**variables, "params": params}, X, MASK)
            return jnp.sum(jnp.sin(y)), (y, aux)

        both = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, (y, aux)), grads = both(variables["params"])
        assert (np.asarray(y)[np.asarray(MASK) == 0] == 0).all()
        assert set(aux.events) == set(moe.cost(D))
        results[dispatch_] = (y, grads, int(aux.events["experts"]["rows"].needed))
    for y, grads, needed in list(results.values())[1:]:
        np.testing.assert_allclose(y, results["mask"][0], atol=2e-5)
        assert needed == results["mask"][2]
        for ours, reference in zip(
            jax.tree.leaves(grads), jax.tree.leaves(results["mask"][1]), strict=True
        ):
            np.testing.assert_allclose(ours, reference, rtol=2e-3, atol=2e-4)


@functools.partial(jax.jit, static_argnums=2)
def two_ways(scores, x, k):
    """(plan, what dropless dispatch gives, what the mask gives)."""
    plan = choose.top_k(scores, k, renormalize=k > 1)
    return plan, dispatch.dropless(plan, x, BANK, E)[0], dispatch.mask(plan, x, BANK, E)[0]


@settings(max_examples=12, deadline=None)
@given(
    n=st.sampled_from([1, 3, 17]),
    k=st.integers(1, E),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 10_000),
)
def test_dropless_equals_the_mask_on_ties_and_extremes(n, k, scale, seed):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.integers(-2, 3, (n, E)), jnp.float32)  # integers: many ties
    x = jnp.asarray(rng.normal(size=(n, D)), jnp.float32)
    scores = np.asarray(
        jax.nn.softmax(logits, axis=-1)
    )  # once: fused twice, equal ones may round apart
    plan, y, reference = two_ways(scores, x, k)
    assert np.isfinite(np.asarray(plan.weights)).all()
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert (np.asarray(plan.experts) == best).all()  # ties go to the lower index
    np.testing.assert_allclose(y, reference, atol=1e-4)


def test_k_equal_to_the_number_of_experts_is_the_dense_mixture():
    moe, variables = made(ROUTERS["all"])
    rows = np.asarray(X, np.float64).reshape(-1, D)
    p = {k: np.asarray(v, np.float64) for k, v in variables["params"].items() if k != "router"}
    h = rows @ np.asarray(variables["params"]["router"]["kernel"], np.float64)
    gates = np.exp(h - h.max(1, keepdims=True))
    gates /= gates.sum(1, keepdims=True)
    expected = 0
    for e in range(E):
        g = rows @ p["gate"][e]
        expected += gates[:, e : e + 1] * (
            (g / (1 + np.exp(-g)) * (rows @ p["up"][e])) @ p["down"][e]
        )
    found = np.asarray(moe.apply(variables, X)[0]).reshape(-1, D)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bfloat16_routes_in_float32():
    moe, variables = made(ROUTERS["top_k"], dtypes=DTypes(compute="bfloat16"))
    full, same = made(ROUTERS["top_k"])
    low, aux = moe.apply(variables, X.astype(jnp.bfloat16), capture=("plan",))
    high, reference = full.apply(
        same, X.astype(jnp.bfloat16).astype(jnp.float32), capture=("plan",)
    )
    assert low.dtype == jnp.bfloat16
    ours, theirs = aux.plans["route"], reference.plans["route"]
    np.testing.assert_array_equal(ours.experts, theirs.experts)
    np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-6)
    scale = np.abs(np.asarray(high)).max()
    np.testing.assert_allclose(np.asarray(low, np.float32), high, atol=0.04 * scale)


def test_first_choices_come_before_second_ones_under_scarcity():
    """Two experts, one slot each: row 0's second choice must not take the slot that row 1 wants first."""
    scores = jnp.asarray([[0.6, 0.4, 0, 0], [0.45, 0.55, 0, 0]], jnp.float32)
    plan = choose.top_k(scores, 2)
    kept, dropped = dispatch.limit(plan, jnp.asarray([1, 1, 1, 1]), "choice")
    assert np.asarray(kept.keep).tolist() == [[True, False], [True, False]] and int(dropped) == 2
    by_row, _ = dispatch.limit(plan, jnp.asarray([1, 1, 1, 1]), "row")
    assert np.asarray(by_row.keep).tolist() == [[True, True], [False, False]]


def test_priority_by_score_changes_only_who_is_dropped():
    scores = jnp.asarray([[0.5, 0.3, 0.1, 0.1], [0.9, 0.05, 0.03, 0.02], [0.7, 0.2, 0.05, 0.05]])
    plan = choose.top_k(scores, 1)
    plan = plan.replace(priority=plan.weights[:, 0])
    kept, _ = dispatch.limit(plan, jnp.asarray([2, 2, 2, 2]), "score")
    assert np.asarray(kept.keep[:, 0]).tolist() == [False, True, True]
    everything, dropped = dispatch.limit(plan, jnp.asarray([3, 3, 3, 3]), "score")
    assert np.asarray(everything.keep).all() and int(dropped) == 0
    x = jnp.asarray(RNG.normal(size=(3, D)), jnp.float32)
    y, stats = dispatch.capacity(plan, x, BANK, E, 2, "score")
    np.testing.assert_allclose(y, dispatch.mask(kept, x, BANK, E)[0], atol=1e-5)
    assert int(stats.dropped) == 1
    with pytest.raises(DyncompError, match="priority"):
        dispatch.limit(plan.replace(priority=None), jnp.asarray([2, 2, 2, 2]), "score")


@pytest.mark.parametrize("dispatch_", ["dropless", "mask", "gather", "capacity"])
def test_mlp_experts_with_biases_against_float64(dispatch_):
    options = {"capacity_factor": 100.0} if dispatch_ == "capacity" else {}
    moe, variables = made(ROUTERS["top_k"], dispatch_, bank=MLPBank, **options)
    params = {k: v for k, v in variables["params"].items() if k != "router"}
    params = {k: v + 0.1 * jnp.arange(v.size).reshape(v.shape) / v.size for k, v in params.items()}
    variables = {**variables, "params": {**variables["params"], **params}}
    y, aux = moe.apply(variables, X, capture=("plan",))
    gates = np.asarray(aux.plans["route"].one_hot(E), np.float64)
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    rows, expected = np.asarray(X, np.float64).reshape(-1, D), 0
    for e in range(E):
        h = rows @ p["up"][e] + p["up_bias"][e]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        expected += gates[:, e : e + 1] * (h @ p["down"][e] + p["down_bias"][e])
    np.testing.assert_allclose(np.asarray(y).reshape(-1, D), expected, atol=1e-4)
    assert moe.cost(D)["experts"]["rows"].flops == 4 * D * F


def test_shared_experts_add_a_unit_that_every_token_passes():
    from dyncomp.experts import SwiGLU

    shared = functools.partial(SwiGLU, hidden=3)
    for gated in (False, True):
        moe, variables = made(ROUTERS["top_k"], shared=shared, shared_gate=gated)
        plain = MoE(router=ROUTERS["top_k"], num_experts=E, hidden=F)
        own = {k: v for k, v in variables["params"].items() if not k.startswith("shared")}
        unit, _ = SwiGLU(hidden=3).apply({"params": variables["params"]["shared"]}, X)
        factor = 0.5 if gated else 1.0  # the gate starts at sigmoid(0)
        expected = plain.apply({"params": own}, X)[0] + factor * unit
        y, aux = moe.apply(variables, X)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        assert int(aux.events["shared"]["tokens"].needed) == 20


def test_no_matrix_of_tokens_by_experts_by_capacity_is_built():
    n, slots = 512, 256
    run = lambda scores, x: dispatch.capacity(choose.top_k(scores, 2), x, BANK, E, slots)[0]
    traced = jax.make_jaxpr(run)(jnp.zeros((n, E)), jnp.zeros((n, D)))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for out in equation.outvars:
                yield int(np.prod(out.aval.shape))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    assert max(sizes(traced.jaxpr)) < n * E * slots / 16
