"""Routers that score: gates, noise, bias, groups, expert choice, hashing; each against its definition in numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import routers
from dyncomp.core.errors import DyncompError
from dyncomp.routers.noise import unit_scale
from dyncomp.routers.sigmoid import balanced_bias

E, N, D = 8, 24, 6
RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
KEY = jax.random.key(1)


def made(router, **collections):
    variables = nn.unbox(jax.jit(router.init)({"params": KEY, "router": KEY}, X))
    params = {k: v * 40 if k == "kernel" else v for k, v in variables["params"].items()}
    return {**variables, "params": params, **collections}


def logits_of(variables):
    return np.asarray(X, np.float64) @ np.asarray(variables["params"]["kernel"], np.float64)


def softmax(h):
    p = np.exp(h - h.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def test_renormalised_gates_are_the_softmax_over_the_chosen_logits():
    router = routers.TopK(num_experts=E, k=3)
    variables = made(router)
    plan, _ = router.apply(variables, X)
    h = logits_of(variables)
    chosen = np.take_along_axis(h, np.asarray(plan.experts), axis=1)
    np.testing.assert_allclose(plan.weights, softmax(chosen), rtol=1e-4)
    assert (np.asarray(plan.experts) == np.argsort(-h, axis=1)[:, :3]).all()


def test_adding_a_constant_to_a_row_changes_only_the_z_loss():
    router = routers.TopK(num_experts=E, k=2)
    variables = made(router)
    variables["params"]["kernel"] = variables["params"]["kernel"].at[-1].set(1.0)
    plan, before = router.apply(variables, X)
    moved, after = router.apply(variables, X.at[:, -1].add(3.0))  # every logit grows by 3
    np.testing.assert_allclose(plan.weights, moved.weights, rtol=1e-3)
    for name in ("balance", "balance_first", "importance", "entropy"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-3)
    assert float(after["z"]) != pytest.approx(float(before["z"]), rel=0.1)


def test_switch_gates_stay_raw_and_jitter_only_in_training():
    router = routers.Switch(num_experts=E, jitter=0.5)
    variables = made(router)
    plan, _ = router.apply(variables, X)
    np.testing.assert_allclose(plan.weights[:, 0], softmax(logits_of(variables)).max(1), rtol=1e-4)
    noisy, _ = router.apply(variables, X, train=True, rngs={"router": KEY})
    assert not np.allclose(noisy.weights, plan.weights)


def test_fixed_noise_has_the_said_standard_deviation():
    router = routers.TopK(num_experts=E, k=E, noise="fixed", noise_std=2.0, renormalize=False)
    variables = made(router)
    draws = []
    for seed in range(300):
        plan, found = router.apply(variables, X, train=True, rngs={"router": jax.random.key(seed)})
        draws.append(np.log(plan.one_hot(E)))  # log p = h - lse: differences cancel the lse
    differences = np.asarray(draws)[:, :, 0] - np.asarray(draws)[:, :, 1]
    np.testing.assert_allclose(differences.std(axis=0), np.sqrt(2) * 2.0 / E, rtol=0.2)
    assert "load" in found


def test_random_second_keeps_the_second_with_twice_its_gate():
    router = routers.RandomSecond(num_experts=E)
    variables = made(router)
    kept = np.zeros(N)
    for seed in range(400):
        plan, _ = router.apply(variables, X, train=True, rngs={"router": jax.random.key(seed)})
        assert plan.keep[:, 0].all()
        kept += np.asarray(plan.keep[:, 1])
    full, _ = router.apply(variables, X)
    np.testing.assert_allclose(kept / 400, 2 * np.asarray(full.weights[:, 1]), atol=0.1)


def test_expert_choice_takes_exactly_c_and_reads_the_future():
    router = routers.ExpertChoice(num_experts=E, capacity_factor=2.0)
    variables = made(router)
    plan, losses = router.apply(variables, X)
    c = N * 2 // E
    assert (np.asarray(plan.load(E)) == c).all() and plan.bound == c * E
    p = softmax(logits_of(variables))
    for e in range(E):
        best = set(np.argsort(-p[:, e])[:c])
        assert set(np.flatnonzero(np.asarray(plan.keep[:, e]))) == best
    order = np.asarray(RNG.permutation(N))
    again, _ = router.apply(variables, X[order])
    np.testing.assert_allclose(again.one_hot(E), plan.one_hot(E)[order], rtol=1e-5)
    late, _ = router.apply(
        variables, X.at[-1].multiply(-100.0)
    )  # the last row outbids an earlier one
    assert (np.asarray(late.keep[:-1]) != np.asarray(plan.keep[:-1])).any()
    mask = (jnp.arange(N) < 3).astype(jnp.float32)
    few, _ = router.apply(variables, X, mask)
    assert not few.keep[3:].any() and (np.asarray(few.load(E)) == 3).all()


def test_expert_choice_in_groups_serves_each_apart():
    router = routers.ExpertChoice(num_experts=E, capacity_factor=2.0, groups=3)
    variables = made(router)
    plan, _ = router.apply(variables, X)
    for g in range(3):
        alone, _ = routers.ExpertChoice(num_experts=E).apply(variables, X[g * 8 : g * 8 + 8])
        np.testing.assert_allclose(plan.one_hot(E)[g * 8 : g * 8 + 8], alone.one_hot(E), rtol=1e-5)


def test_sigmoid_gates_ignore_the_bias_and_selection_follows_it():
    router = routers.SigmoidTopK(num_experts=E, k=2, scale=2.5)
    variables = made(router)
    bias = np.zeros(E, np.float32)
    bias[5] = 10.0
    plan, _ = router.apply({**variables, "controls": {"bias": jnp.asarray(bias)}}, X)
    s = 1 / (1 + np.exp(-logits_of(variables)))
    assert (np.asarray(plan.experts[:, 0]) == 5).all()
    for i in range(N):
        other = int(plan.experts[i, 1])
        assert other == max((e for e in range(E) if e != 5), key=lambda e: s[i, e])
        total = s[i, 5] + s[i, other]
        np.testing.assert_allclose(plan.weights[i], 2.5 * s[i, [5, other]] / total, rtol=1e-4)
    loss = lambda b: jnp.sum(router.apply({**variables, "controls": {"bias": b}}, X)[0].weights)
    assert (np.asarray(jax.grad(loss)(jnp.asarray(bias))) == 0).all()


def test_bias_moves_against_the_load_by_hand():
    found = balanced_bias(jnp.float32([0.5, 0.5, 0.5]), jnp.int32([5, 2, 2]), 0.1)
    np.testing.assert_allclose(found, [0.4, 0.6, 0.6], rtol=1e-6)
    at_mean = balanced_bias(jnp.float32([0.0, 0.0]), jnp.int32([3, 3]), 0.1)
    assert (np.asarray(at_mean) == 0).all()


def test_training_moves_the_bias_and_evaluation_does_not():
    router = routers.SigmoidTopK(num_experts=E, k=2, bias_rate=0.01)
    variables = made(router)
    (plan, _), moved = router.apply(variables, X, train=True, mutable=["controls"])
    load = np.asarray(plan.load(E))
    np.testing.assert_allclose(
        moved["controls"]["bias"], 0.01 * np.sign(load.mean() - load), rtol=1e-5
    )
    _, still = router.apply(variables, X, mutable=["controls"])
    assert (np.asarray(still["controls"]["bias"]) == 0).all()


def test_groups_limit_where_experts_come_from():
    router = routers.SigmoidTopK(num_experts=E, k=3, groups=4, keep_groups=2)
    variables = made(router)
    plan, _ = router.apply(variables, X)
    s = 1 / (1 + np.exp(-logits_of(variables)))
    for i in range(N):
        totals = s[i].reshape(4, 2).sum(axis=1)
        best = np.argsort(-totals)[:2]
        inside = [e for e in range(E) if e // 2 in best]
        expected = sorted(inside, key=lambda e: -s[i, e])[:3]
        assert list(np.asarray(plan.experts[i])) == expected


def test_relu_gates_and_their_penalty():
    router = routers.ReLU(num_experts=E, k=2.0, growth=1.5)
    variables = made(router)
    (plan, losses), moved = router.apply(variables, X, train=True, mutable=["controls"])
    h = np.maximum(logits_of(variables), 0)
    np.testing.assert_allclose(plan.one_hot(E), h, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses["sparsity"], 1e-8 * h.sum(axis=1).mean(), rtol=1e-4)
    used = (h > 0).sum(axis=1).mean()
    np.testing.assert_allclose(
        moved["controls"]["penalty"], 1e-8 * 1.5 ** np.sign(used - 2.0), rtol=1e-5
    )


def test_threshold_by_hand():
    router = routers.Threshold(num_experts=E, theta=0.4)
    variables = made(router)
    plan, _ = router.apply(variables, X)
    p = softmax(logits_of(variables))
    np.testing.assert_allclose(plan.one_hot(E), np.where(p > 0.4, p, 0), rtol=1e-4)
    best, _ = routers.Threshold(num_experts=E, theta=1.0, empty="best").apply(
        {**variables, "controls": {"theta": jnp.float32(1.0)}}, X
    )
    assert (np.asarray(best.counts()) == 1).all()


def test_hash_is_a_function_of_the_token_and_even():
    router = routers.Hash(num_experts=E, k=2)
    tokens = jnp.arange(4096, dtype=jnp.int32)
    x = jnp.zeros((4096, D))
    variables = router.init({"params": KEY}, x, below={"tokens": tokens})
    plan, _ = router.apply(variables, x, below={"tokens": tokens})
    again, _ = router.apply(variables, x + 1, below={"tokens": tokens[::-1]})
    assert (np.asarray(plan.experts) == np.asarray(again.experts)[::-1]).all()
    assert (np.asarray(plan.experts[:, 0]) != np.asarray(plan.experts[:, 1])).all()
    load = np.asarray(plan.load(E))
    assert abs(load - 1024).max() < 5 * np.sqrt(1024)


def test_cosine_scores_do_not_depend_on_the_length_of_a_row():
    router = routers.TopK(num_experts=E, k=2, scorer="cosine")
    variables = nn.unbox(jax.jit(router.init)({"params": KEY}, X))
    plan, _ = router.apply(variables, X)
    longer, _ = router.apply(variables, 7.5 * X)
    np.testing.assert_allclose(plan.weights, longer.weights, rtol=1e-4)
    params = variables["params"]
    rows = np.asarray(X @ params["projection"], np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = np.asarray(params["embedding"], np.float64)
    table = table / np.linalg.norm(table, axis=0, keepdims=True)
    p = softmax(2.0 * rows @ table)  # exp(log(1/0.5)) = 2
    top = -np.sort(-p, axis=1)[:, :2]
    np.testing.assert_allclose(plan.weights, top / top.sum(1, keepdims=True), rtol=1e-4)


def test_unit_scale_is_the_unbiased_standard_deviation():
    h = jnp.asarray(RNG.normal(size=(5, E)), jnp.float32)
    found = np.asarray(unit_scale(h, 1.5))
    np.testing.assert_allclose(found.std(axis=1, ddof=1), 1.5, rtol=1e-5)
    np.testing.assert_allclose(unit_scale(10 * h, 1.5), found, rtol=1e-5)


def test_random_free_draws_the_number_of_networks():
    router = routers.RandomFree(
        num_experts=E, k=2, free_experts=3, histogram=(0.2, 0.5, 0.3), null_experts=1
    )
    x = jnp.asarray(RNG.normal(size=(4000, D)), jnp.float32)
    variables = nn.unbox(jax.jit(router.init)({"params": KEY}, x[:2]))
    plan, _ = router.apply(variables, x, train=True, rngs={"router": KEY})
    networks = (np.asarray(plan.experts) < 5).sum(axis=1)
    np.testing.assert_allclose(np.bincount(networks) / 4000, [0.2, 0.5, 0.3], atol=0.03)
    h = np.asarray(x @ variables["params"]["kernel"])
    best = np.argsort(-h[:, :5], axis=1)
    for i in range(50):
        own = set(int(e) for e in np.asarray(plan.experts[i]) if e < 5)
        assert own == set(best[i, : networks[i]].tolist())


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(routers.TopK, k=9),
        functools.partial(routers.TopK, jitter=1.5),
        functools.partial(routers.TopK, balance_weights=(1.0,)),
        functools.partial(routers.Threshold, theta=2.0),
        functools.partial(routers.ExpertChoice, capacity_factor=9.0),
        functools.partial(routers.SigmoidTopK, k=5, groups=4, keep_groups=2),
        functools.partial(routers.ReLU, k=0.0),
        functools.partial(routers.RandomSecond, k=3),
        functools.partial(routers.RandomFree, histogram=(1.0,)),
        functools.partial(routers.Hash, k=0),
        functools.partial(routers.Given, choice=8),
    ],
    ids=lambda make: f"{make.func.__name__}-{list(make.keywords)[0]}",
)
def test_options_that_make_no_sense_are_refused_by_name(make):
    router = make(num_experts=E)
    with pytest.raises(DyncompError, match=type(router).__name__):
        jax.eval_shape(router.init, {"params": KEY, "router": KEY}, X)
