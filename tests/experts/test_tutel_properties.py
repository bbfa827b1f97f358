"""The sheet's properties of capacity, slots, priorities and losses, against loops and closed forms.

Output under r and d (property 8) on eight devices: tests/parallel/test_expert_parallel.py.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core import dispatch
from dyncomp.core.plans import RoutePlan
from dyncomp.experts import MLP, MLPBank, MoE
from dyncomp.experts.capacity import tutel_slots
from dyncomp.routers import TopK, losses

N, D, E, K = 24, 5, 4, 2


@dataclasses.dataclass
class Seen:
    """A bank that keeps the buffer it is given and answers with another one, or with the same."""

    answer: Any = None
    rows: Any = None

    def batched(self, rows):
        self.rows = rows
        return rows if self.answer is None else self.answer


def drawn(n=N, e=E, k=K, seed=0):
    """x, a plan with distinct experts, and scores for its priority."""
    rng = np.random.default_rng(seed)
    liking = 1.0 / np.arange(1, e + 1)
    experts = [rng.choice(e, k, replace=False, p=liking / liking.sum()) for _ in range(n)]
    weights = rng.uniform(0.1, 1, (n, k)).astype("f")
    priority = jnp.asarray(rng.permutation(n), jnp.float32)
    plan = RoutePlan(jnp.asarray(np.stack(experts), jnp.int32), jnp.asarray(weights),
                     jnp.ones((n, k), bool), priority)  # fmt: skip
    return jnp.asarray(rng.normal(size=(n, D)), jnp.float32), plan


def positions(plan, order=None):
    """Slot of each choice as the official code counts: first choices before second ones, then in ``order``."""
    experts = np.asarray(plan.experts)
    n, k = experts.shape
    order = range(n) if order is None else order
    taken, place = np.zeros(E, int), np.zeros((n, k), int)
    for choice in range(k):
        for row in order:
            place[row, choice] = taken[experts[row, choice]]
            taken[experts[row, choice]] += 1
    return place


def by_score(plan):
    return sorted(range(N), key=lambda i: -float(plan.priority[i]))


def ones(plan):
    return dataclasses.replace(plan, weights=jnp.ones_like(plan.weights))


# ---- 1, 2, 5, 7, 9: slots


def test_decode_of_encode_is_the_input():
    x, plan = drawn(k=1)
    y, stats = dispatch.capacity(ones(plan), x, Seen(), E, N, "choice")
    np.testing.assert_array_equal(y, x)
    assert int(stats.dropped) == 0


@pytest.mark.parametrize("priority", ["choice", "score"])
@pytest.mark.parametrize("slots", [1, 3, 7])
def test_slots_are_served_in_the_order_of_the_official_code(slots, priority):
    """Outputs of all-one experts count a row's served choices: k less its drops."""
    x, plan = drawn()
    served = positions(plan, by_score(plan) if priority == "score" else None) < slots
    y, stats = dispatch.capacity(ones(plan), jnp.ones_like(x), Seen(), E, slots, priority)
    np.testing.assert_array_equal(y[:, 0], served.sum(axis=1))
    assert int(stats.dropped) == N * K - served.sum() > 0
    for e in range(E):  # no second choice is served where a first one for the same expert is not
        mine = np.asarray(plan.experts) == e
        if (mine[:, 0] & ~served[:, 0]).any():
            assert not (mine[:, 1] & served[:, 1]).any()


def test_encode_and_decode_are_adjoint():
    x, plan = drawn()
    slots, rng = 4, np.random.default_rng(3)
    place = positions(plan)
    filled = np.zeros((E, slots, 1))
    for i, c in np.ndindex(N, K):
        if place[i, c] < slots:
            filled[int(plan.experts[i, c]), place[i, c]] = 1
    b = jnp.asarray(rng.normal(size=(E, slots, D)) * filled, jnp.float32)
    bank = Seen(answer=b)
    decoded, _ = dispatch.capacity(ones(plan), x, bank, E, slots, "choice")
    encoded = np.asarray(bank.rows, np.float64)
    np.testing.assert_allclose(np.sum(encoded * np.asarray(b)), np.sum(x * decoded), rtol=1e-5)


def test_priority_only_says_who_is_dropped():
    x, plan = drawn()
    every = [dispatch.capacity(plan, x, Seen(), E, N, p)[0] for p in ("row", "choice", "score")]
    np.testing.assert_array_equal(every[0], every[1])
    np.testing.assert_array_equal(every[0], every[2])
    scarce = [dispatch.capacity(plan, x, Seen(), E, 3, p) for p in ("choice", "score")]
    assert int(scarce[0][1].dropped) == int(scarce[1][1].dropped)
    assert not np.array_equal(scarce[0][0], scarce[1][0])
    equal = dataclasses.replace(plan, priority=jnp.zeros(N))  # ties: the order of rows
    again = dispatch.capacity(equal, x, Seen(), E, 3, "score")[0]
    np.testing.assert_array_equal(again, scarce[0][0])


# ---- 3, 4 and the traps: capacities


def test_one_expert_is_the_plain_network():
    moe = MoE(functools.partial(TopK, k=1, renormalize=False), 1, 7, bank=MLPBank,
              dispatch="capacity", capacity_factor=1.0)  # fmt: skip
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, D)), jnp.float32)
    variables = nn.unbox(jax.jit(moe.init)(jax.random.key(0), x))
    params = {name: variables["params"][name][0] for name in MLPBank.axes}
    dense, _ = MLP(hidden=7).apply({"params": params}, x)
    np.testing.assert_allclose(moe.apply(variables, x)[0], dense, atol=1e-6)


def bank_of(seed=1):
    draw = lambda *s: jnp.asarray(np.random.default_rng(seed).normal(size=s), jnp.float32)
    return MLPBank(draw(E, D, 3), draw(E, 3), draw(E, 3, D), draw(E, D))


@pytest.mark.parametrize("priority", ["choice", "score"])  # the official code's f = 0 fails here
def test_ample_adaptive_and_dropless_are_the_dense_mask(priority):
    x, plan = drawn()
    most = int(np.bincount(np.asarray(plan.experts).ravel(), minlength=E).max())
    assert tutel_slots(N, E, K, 0.0, most) == most < tutel_slots(N, E, K, 3.0, most)

    def value(x, weights, bank, run):
        y, stats = run(dataclasses.replace(plan, weights=weights), x, bank)
        return jnp.sum(jnp.sin(y)), (y, stats.dropped)

    runs = [lambda p, x, b, c=c: dispatch.capacity(p, x, b, E, c, priority) for c in (most, N)]
    runs.append(lambda p, x, b: dispatch.dropless(p, x, b, E))
    differentiated = lambda run: jax.grad(
        functools.partial(value, run=run), (0, 1, 2), has_aux=True
    )
    grad = lambda run: jax.jit(differentiated(run))(x, plan.weights, bank_of())
    grads, (y, _) = grad(lambda p, x, b: dispatch.mask(p, x, b, E))
    for run in (*runs, einsum):
        theirs, (got, dropped) = grad(run)
        np.testing.assert_allclose(got, y, atol=1e-4)
        for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        assert int(dropped) == 0


def einsum(plan, x, bank, num_experts=E, slots=N):
    """One-hot dispatch and combine (Lepikhin et al. 2020, algorithm 1): what the sparse form replaces."""
    rank = jnp.cumsum(jax.nn.one_hot(plan.experts.T.reshape(-1), num_experts), axis=0)
    rank = (rank - 1).reshape(plan.experts.shape[1], -1, num_experts).swapaxes(0, 1)  # [n k e]
    chosen = jax.nn.one_hot(plan.experts, num_experts)
    at = jax.nn.one_hot(jnp.sum(rank * chosen, -1).astype(jnp.int32), slots)
    mask = jnp.einsum("nke,nkc->nec", chosen, at)
    combine = jnp.einsum("nk,nke,nkc->nec", plan.weights, chosen, at)
    y = bank.batched(jnp.einsum("nec,nd->ecd", mask, x))
    return jnp.einsum("nec,ecd->nd", combine, y), dispatch.Stats(jnp.int32(0), jnp.int32(0))


@pytest.mark.parametrize(
    ("rows", "experts", "k", "factor", "most", "multiple", "slots"),
    [
        (8, 4, 1, 1.25, 8, 1, 2),  # truncated: the same as factor 1
        (8, 4, 1, 0.3, 8, 1, 1),  # int(0.6) = 0 would drop everything
        (8, 4, 2, 1.25, 8, 1, 4),  # 2 * int(2.5), not int(5.0)
        (9, 4, 1, 1.0, 9, 1, 3),  # the even share is rounded up
        (64, 4, 1, 0.0, 23, 1, 23),
        (64, 4, 1, -1.25, 23, 1, 20),
        (64, 4, 1, -1.25, 17, 1, 17),
        *((64, 4, 1, 0.0, 5, d, c) for d, c in ((1, 5), (2, 6), (4, 8), (8, 8))),
    ],
)
def test_capacities_are_those_of_the_official_code(rows, experts, k, factor, most, multiple, slots):
    assert tutel_slots(rows, experts, k, factor, most, multiple) == slots


@pytest.mark.parametrize("experts", [4, 16])
def test_what_the_einsum_costs_and_the_sparse_form_does_not(experts):
    """2 x 2 T E C D FLOPs at E C = T: quadratic in T and the same for all E; gathers multiply nothing."""
    d = 64

    def flops(form, rows):
        x, plan = drawn(rows, experts, 1)
        x = jnp.zeros((rows, d), jnp.float32)
        fn = lambda x: form(ones(plan), x, Seen(), experts, rows // experts)[0]
        return jax.jit(fn).lower(x).compile().cost_analysis()["flops"]

    small, large = (flops(einsum, rows) for rows in (128, 256))
    exact = [4 * rows * rows * d for rows in (128, 256)]  # two products of [T, E C] with width d
    assert small == pytest.approx(exact[0], rel=0.15) and large == pytest.approx(exact[1], rel=0.15)
    assert flops(dispatch.capacity, 256) < 0.05 * large


# ---- 6, 10: losses and scores


def test_balance_loss_of_first_choices():
    _, plan = drawn()
    loss = lambda p, plan: losses.balance_loss(p, plan, choices="first")
    rng = np.random.default_rng(0)
    some = rng.dirichlet(np.ones(E), N).astype("f")
    even = np.arange(N)[:, None] % E  # first choices spread evenly
    spread = dataclasses.replace(plan, experts=jnp.asarray(np.concatenate([even, even + 1], 1) % E))
    np.testing.assert_allclose(loss(jnp.full((N, E), 1 / E), plan), 1.0, rtol=1e-6)
    np.testing.assert_allclose(loss(jnp.asarray(some), spread), 1.0, rtol=1e-5)
    one = dataclasses.replace(plan, experts=jnp.tile(jnp.int32([[2, 0]]), (N, 1)))
    np.testing.assert_allclose(loss(jax.nn.one_hot(jnp.full(N, 2), E), one), E, rtol=1e-6)
    # d loss / d p_te = E f_e / N: only through the mean, whatever the second choices are
    share = np.bincount(np.asarray(plan.experts)[:, 0], minlength=E) / N
    grad = jax.grad(loss)(jnp.asarray(some), plan)
    np.testing.assert_allclose(grad, np.tile(E * share / N, (N, 1)), rtol=1e-5)


def test_cosine_scores_do_not_depend_on_length():
    router = TopK(num_experts=E, k=1, scorer="cosine")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
    variables = nn.unbox(jax.jit(router.init)(jax.random.key(0), x))
    assert not np.asarray(variables["params"]["bias"]).any()
    plans = [router.apply(variables, c * x)[0] for c in (1.0, 7.5, 0.02)]
    for plan in plans[1:]:
        np.testing.assert_array_equal(plan.experts, plans[0].experts)
        np.testing.assert_allclose(plan.weights, plans[0].weights, rtol=1e-5)
    # float64 by hand: logits are exp(min(t, log 100)) = 2 times cosines, at most
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    h, s = np.asarray(x, np.float64) @ p["projection"], p["embedding"]
    cosines = (h / np.linalg.norm(h, axis=1, keepdims=True)) @ (s / np.linalg.norm(s, axis=0))
    z = np.exp(2.0 * cosines)
    np.testing.assert_allclose(
        plans[0].weights[:, 0] if router.renormalize else plans[0].weights, np.ones(N)
    )
    raw = TopK(num_experts=E, k=1, scorer="cosine", renormalize=False).apply(variables, x)[0]
    np.testing.assert_allclose(raw.weights[:, 0], (z / z.sum(1, keepdims=True)).max(1), rtol=1e-4)
