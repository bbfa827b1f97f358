import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core import choose
from dyncomp.core.errors import DyncompError
from dyncomp.routers import Random, TopK, TopP, balance_loss, entropy_loss

E, N, D = 8, 20, 6
ROUTERS = [
    TopK(num_experts=E, k=2),
    TopK(num_experts=E, k=3, renormalize=False),
    TopP(num_experts=E),
    TopP(num_experts=E, p=0.9),
    Random(num_experts=E, histogram=(0.5, 0.5)),
]
X = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)


def make(router):
    variables = jax.jit(router.init)(jax.random.key(0), X)
    return jax.tree.map(lambda a: a * 50 if a.ndim == 2 else a, variables)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda r: type(r).__name__)
def test_contract(router):
    mask = (jnp.arange(N) < 15).astype(jnp.float32)
    variables = make(router)
    plan, losses = router.apply(variables, X, mask)
    assert plan.weights.dtype == jnp.float32 and plan.experts.dtype == jnp.int32
    counts = np.asarray(plan.counts())
    assert (counts[:15] >= 1).all() and (counts[15:] == 0).all()
    for row, keep in zip(np.asarray(plan.experts), np.asarray(plan.keep), strict=True):
        assert len(set(row[keep])) == keep.sum() and ((0 <= row) & (row < E)).all()
    assert (np.asarray(plan.weights)[~np.asarray(plan.keep)] == 0).all()
    _, again = router.apply(variables, X.at[15:].set(9.0), mask)
    for name in losses:  # padding counts nowhere
        np.testing.assert_allclose(losses[name], again[name], rtol=1e-6)
    assert set(router.cost(D)) == {"rows"}


def test_uniform_probabilities_take_floor_pe_plus_one():
    for p, expected in [(0.0, 1), (0.25, 3), (0.4, 4), (0.5, 5), (0.99, 8), (1.0, 8)]:
        router = TopP(num_experts=E, p=p)
        variables = jax.tree.map(
            lambda a: a * 0 if a.ndim == 2 else a, jax.jit(router.init)(jax.random.key(0), X)
        )
        plan, losses = router.apply(variables, X)
        assert (plan.counts() == expected).all()
        np.testing.assert_allclose(losses["balance"], expected, rtol=1e-5)
        np.testing.assert_allclose(losses["entropy"], np.log(E), rtol=1e-5)


def test_nucleus_against_a_loop_and_p_is_a_run_time_argument(counting_jit):
    router = TopP(num_experts=E)
    variables = make(router)
    probabilities = np.asarray(jax.nn.softmax(X @ jax.tree.leaves(variables["params"])[0]))
    apply, traces = counting_jit(lambda p: router.apply({**variables, "controls": {"p": p}}, X)[0])
    last = np.zeros(N)
    for p in (0.1, 0.3, 0.55, 0.8, 0.95):
        plan = apply(jnp.float32(p))
        for i, row in enumerate(probabilities):
            mass, chosen = 0.0, []
            for e in np.argsort(-row):
                chosen.append(e)
                mass += row[e]
                if mass > p:
                    break
            keep = np.asarray(plan.keep[i])
            assert set(np.asarray(plan.experts[i])[keep]) == set(chosen)
            np.testing.assert_allclose(plan.weights[i].sum(), mass, rtol=1e-5)
        assert (plan.counts() >= last).all()
        last = plan.counts()
    assert len(traces) == 1


def test_entropy_gradient_closed_form_and_shift():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, E)), jnp.float32)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    entropy = -(p * np.log(p)).sum()
    np.testing.assert_allclose(
        jax.grad(entropy_loss)(logits), -p * (np.log(p) + entropy), atol=1e-6
    )
    np.testing.assert_allclose(entropy_loss(logits + 3.0), entropy_loss(logits), rtol=1e-5)
    assert float(entropy_loss(jnp.array([[80.0, 0.0, 0.0]]))) < 1e-6


def test_balance_by_hand():
    plan = choose.top_k(q := jnp.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), 1)
    expected = 2 * (2 / 3 * (1.7 / 3) + 1 / 3 * (1.3 / 3))
    np.testing.assert_allclose(
        balance_loss(q, plan.replace(weights=plan.weights)), expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    "router", [TopK(num_experts=2, k=3), TopP(num_experts=2, p=1.5), Random(num_experts=1)]
)
def test_bad_options_are_refused_by_name(router):
    with pytest.raises(DyncompError, match=type(router).__name__):
        jax.eval_shape(router.init, jax.random.key(0), X)
