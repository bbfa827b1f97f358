"""The nine properties of the method, against independent derivations (brute force, float64, finite differences)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from dyncomp.core.errors import DyncompError
from dyncomp.exits import (
    ConfidenceRule,
    ExitBank,
    GateRule,
    JointExitObjective,
    MultiExitObjective,
    PatienceRule,
    RampedExitObjective,
    decide,
    gate_features,
)
from dyncomp.exits.objectives import gate_loss, gate_targets, head_loss
from dyncomp.exits.oracle import best_exit, cross_entropy, exit_loss
from dyncomp.exits.rules import exit_mass, hazards

B, Y, C, D = 64, 5, 7, 6


def draw(seed, *shape, low=0.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def mass_brute_force(gates):
    """The definition, one scalar at a time, in float64."""
    out = np.zeros(gates.shape)
    for b in range(gates.shape[1]):
        for y in range(gates.shape[0]):
            out[y, b] = max(0.0, min(float(gates[y, b]), 1.0 - sum(map(float, gates[:y, b]))))
    return out


# 1


@pytest.mark.parametrize("high", [0.15, 0.5, 1.0])
def test_exit_mass_is_a_capped_distribution(high):
    gates = draw(0, Y, B, high=high)
    mass = np.asarray(exit_mass(jnp.asarray(gates)))
    np.testing.assert_allclose(mass, mass_brute_force(gates), atol=1e-6)
    assert (mass >= 0).all() and (mass.sum(0) <= 1 + 1e-6).all()
    running = np.cumsum(gates.astype(np.float64), axis=0)
    within = running <= 1 - 1e-6
    np.testing.assert_array_equal(mass[within], gates[within])
    used_up = np.roll(running >= 1 + 1e-6, 1, axis=0)
    used_up[0] = False
    assert (mass[used_up] == 0).all()


# 2


def test_survival_is_the_product_of_one_minus_hazard():
    gates = draw(1, Y, B, high=0.6)
    mass, hazard = (np.asarray(f(jnp.asarray(gates)), np.float64) for f in (exit_mass, hazards))
    np.testing.assert_allclose(1 - np.cumsum(mass, 0), np.cumprod(1 - hazard, 0), atol=1e-5)
    assert np.isfinite(hazard).all() and (hazard >= 0).all() and (hazard <= 1).all()


def test_hazard_of_nothing_left_is_zero():
    hazard = np.asarray(hazards(jnp.asarray([[1.0], [0.7], [0.0]])))
    np.testing.assert_array_equal(hazard[:, 0], [1.0, 0.0, 0.0])


# 4


def bank_output(params, features, final, costs):
    logits, gates = ExitBank(exits=Y, classes=C).apply({"params": params}, features)
    logits = jnp.concatenate([logits, final[None]])
    return {"logits": logits, "gates": gates, "costs": costs, "pos_weight": jnp.full((Y,), 2.0)}


@pytest.fixture(scope="module")
def problem():
    features = jnp.asarray(draw(2, Y, B, D, low=-2, high=2))
    final = jnp.asarray(draw(3, B, C, low=-3, high=3))
    batch = {
        "targets": jnp.asarray(np.random.default_rng(4).integers(0, C, B), jnp.int32),
        "mask": jnp.ones((B,)).at[-5:].set(0.0),
    }
    params = nn.meta.unbox(jax.jit(ExitBank(exits=Y, classes=C).init)(jax.random.key(0), features))[
        "params"
    ]
    return params, features, final, batch, jnp.linspace(0.2, 1.0, Y + 1)


@pytest.mark.parametrize("reweight", ["paper", "boosted_sg", "official_identity"])
def test_phases_train_one_group_only(problem, reweight):
    params, features, final, batch, costs = problem
    objective = JointExitObjective(lam=0.5, reweight=reweight, period=10)

    def loss(params, features, final, step):
        return objective(bank_output(params, features, final, costs), None, batch, step)[0]

    for step, moving, still in ((3, "gates", "heads"), (12, "heads", "gates")):
        own, inputs, last = jax.grad(loss, argnums=(0, 1, 2))(params, features, final, step)
        assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(own[still]))
        assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(own[moving]))
        assert np.all(np.asarray(last) == 0)
        if moving == "gates":
            assert np.all(np.asarray(inputs) == 0)


def test_padding_has_no_weight(problem):
    params, features, final, batch, costs = problem
    objective = JointExitObjective(lam=0.5)
    whole = bank_output(params, features, final, costs)
    cut = bank_output(params, features[:, :-5], final[:-5], costs)
    real = {name: value[:-5] for name, value in batch.items()}
    for part in ("gate", "heads"):
        a, b = getattr(objective, part)(whole, batch), getattr(objective, part)(cut, real)
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_phase_schedule_starts_each_epoch_with_gates():
    objective = JointExitObjective(period=200, steps_per_epoch=781, first_step=50)
    phase = [objective.in_gate_phase(50 + step) for step in range(2 * 781)]
    one = [True] * 200 + [False] * 200 + [True] * 200 + [False] * 181
    assert phase == one + one


def test_gradients_match_finite_differences(problem):
    params, features, final, batch, costs = problem
    objective = JointExitObjective(lam=0.3)
    for part, group in (("gate", "gates"), ("heads", "heads")):

        def loss(own, part=part, group=group):
            merged = {**params, group: own}
            return getattr(objective, part)(bank_output(merged, features, final, costs), batch)

        check_grads(loss, (params[group],), order=1, modes=["rev"], eps=1e-2, rtol=2e-2)


# 5


def test_best_exit_limits_and_ties(problem):
    loss = draw(5, Y + 1, B)
    costs = np.linspace(0.1, 1, Y + 1).astype(np.float32)
    free = np.asarray(best_exit(jnp.asarray(loss), jnp.asarray(costs), 0.0))
    np.testing.assert_array_equal(free, loss.argmin(0))
    assert (np.asarray(best_exit(jnp.asarray(loss), jnp.asarray(costs), 1e6)) == 0).all()
    flat = jnp.zeros((Y + 1, B))
    assert (np.asarray(best_exit(flat, jnp.asarray(costs), 0.0)) == 0).all()
    mid = np.asarray(best_exit(jnp.asarray(loss), jnp.asarray(costs), 0.7))
    brute = [
        min(range(Y + 1), key=lambda x: (loss[x, b] + np.float32(0.7) * costs[x], x))
        for b in range(B)
    ]
    np.testing.assert_array_equal(mid, brute)


def test_target_scores():
    logits = jnp.asarray([[[0.0, 2.0, 0.0]], [[3.0, 0.0, 0.0]]])
    labels = jnp.asarray([1], jnp.int32)
    p = math.exp(2) / (math.exp(2) + 2)
    np.testing.assert_allclose(exit_loss(logits, labels, "ce")[0, 0], -math.log(p), rtol=1e-6)
    np.testing.assert_array_equal(exit_loss(logits, labels, "error")[:, 0], [0.0, 1.0])
    np.testing.assert_allclose(exit_loss(logits, labels, "confidence")[:, 0], [-p, 0.0], rtol=1e-6)


def test_gate_targets_are_cumulative_and_loss_is_bce():
    targets = np.asarray(gate_targets(jnp.asarray([0, 2, Y], jnp.int32), Y))
    np.testing.assert_array_equal(targets.T, [[1] * 5, [0, 0, 1, 1, 1], [0] * 5])
    gates, weight = draw(6, Y, 3, low=-3, high=3), draw(7, Y, low=0.5, high=5)
    g = 1 / (1 + np.exp(-gates.astype(np.float64)))
    wanted = -(weight[:, None] * targets * np.log(g) + (1 - targets) * np.log(1 - g)).mean(0)
    ours = gate_loss(jnp.asarray(gates), jnp.asarray(targets), jnp.asarray(weight))
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


# 6


def test_official_weighting_is_uniform_training():
    logits = jnp.asarray(draw(8, Y, B, C, low=-3, high=3))
    labels = jnp.asarray(np.random.default_rng(9).integers(0, C, B), jnp.int32)
    mass = exit_mass(jnp.asarray(draw(10, Y, B, high=0.3)))

    def loss(logits, reweight):
        return head_loss(cross_entropy(logits, labels), mass, reweight).mean()

    uniform = lambda logits: cross_entropy(logits, labels).mean()
    value, grad = jax.value_and_grad(uniform)(logits)
    for reweight in ("official_identity", "boosted_sg"):
        np.testing.assert_allclose(loss(logits, reweight), value, rtol=1e-6)
    identity = jax.grad(loss)(logits, "official_identity")
    np.testing.assert_allclose(identity, grad, atol=1e-6)
    boosted = np.asarray(jax.grad(loss)(logits, "boosted_sg"))
    assert np.abs(boosted - np.asarray(grad)).max() > 1e-4
    mass = jnp.full((Y, B), 0.1)
    np.testing.assert_allclose(jax.grad(loss)(logits, "boosted_sg"), grad, atol=1e-6)


def test_paper_weighting_by_hand():
    ce, mass = jnp.asarray([[1.0], [3.0]]), jnp.asarray([[0.25], [0.5]])
    assert float(head_loss(ce, mass, "paper")[0]) == pytest.approx(1.75)
    assert float(head_loss(ce, jnp.zeros((2, 1)), "boosted_sg")[0]) == 0.0


def test_warm_up_weights(problem):
    params, features, final, batch, costs = problem
    output = bank_output(params, features, final, costs)
    ce = np.asarray(cross_entropy(output["logits"], batch["targets"]), np.float64)[:, :-5].mean(1)
    loss, _ = MultiExitObjective()(output, None, batch, 0)
    np.testing.assert_allclose(loss, ce[-1] + np.dot([6, 5, 4, 3, 2], ce[:-1]), rtol=1e-5)
    loss, _ = MultiExitObjective(weights="uniform")(output, None, batch, 0)
    np.testing.assert_allclose(loss, ce[-1] + ce[:-1].mean(), rtol=1e-5)


def test_ramped_weights():
    """tau_l = 0.01 + t/T (depth_l - 0.01), and the final classifier always counts fully."""
    rng = np.random.default_rng(18)
    logits = rng.normal(size=(3, 4, C)).astype(np.float32)
    output = {"logits": jnp.asarray(logits), "costs": jnp.float32([0.25, 0.6, 1.0])}
    batch = {"targets": jnp.arange(4, dtype=jnp.int32), "mask": jnp.float32([1, 1, 1, 0])}
    wide = logits.astype(np.float64)
    ce = np.log(np.exp(wide).sum(-1)) - wide[:, np.arange(4), np.arange(4)]
    ce = ce[:, :3].mean(1)
    for step, tau in ((0, (0.01, 0.01)), (50, (0.13, 0.305)), (100, (0.25, 0.6)), (300, (0.25, 0.6))):  # fmt: skip
        loss, _ = RampedExitObjective(steps=100)(output, None, batch, step)
        np.testing.assert_allclose(loss, ce[2] + tau[0] * ce[0] + tau[1] * ce[1], rtol=1e-5)
    one = RampedExitObjective(steps=100, start=0.0, targets=(1.0, 0.0))
    value = lambda z: one({**output, "logits": z}, None, batch, 50)[0]
    each = np.abs(np.asarray(jax.grad(value)(output["logits"]))).sum((1, 2))
    assert each[1] == 0 and each[0] > 0 and each[2] > 0


# 7


def test_features_at_the_limits(strict):
    uniform = np.asarray(gate_features(jnp.zeros((1, C), jnp.float32)))[0]
    np.testing.assert_allclose(uniform, [1 / C, math.log(C), 0, math.log(C)], atol=1e-6)
    sure = np.asarray(gate_features(jnp.zeros((1, C), jnp.float32).at[0, 2].set(200.0)))[0]
    np.testing.assert_allclose(sure, [1, 0, 1, 0], atol=1e-6)


def test_features_in_float64():
    logits = draw(11, B, C, low=-4, high=4)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    q = p**2 / (p**2).sum(-1, keepdims=True)
    order = np.sort(p, axis=-1)
    h = lambda p: -(p * np.log(p)).sum(-1)
    wanted = np.stack([order[:, -1], h(p), order[:, -1] - order[:, -2], h(q)], axis=-1)
    np.testing.assert_allclose(gate_features(jnp.asarray(logits)), wanted, atol=1e-5)


def test_gates_leave_at_the_first_that_reaches_half_of_what_is_left():
    logits, gate = draw(12, Y, B, C), draw(13, Y, B, low=-4, high=0.5)
    plan = decide(GateRule(), jnp.asarray(logits), jnp.asarray(gate), jnp.full((Y,), 0.5))
    g = 1 / (1 + np.exp(-gate.astype(np.float64)))
    wanted = []
    for b in range(B):
        spent, at = 0.0, Y
        for y in range(Y):
            if g[y, b] >= (1 - spent) / 2:
                at = y
                break
            spent += g[y, b]
        wanted.append(at)
    np.testing.assert_array_equal(plan.exit, wanted)
    assert len(set(wanted)) > 2


@pytest.mark.parametrize("score", ["max_p", "entropy", "margin"])
def test_confidence_rule(score):
    logits = draw(14, Y, B, C, low=-3, high=3)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    top = np.sort(p, axis=-1)
    value = {
        "max_p": top[..., -1],
        "entropy": (p * np.log(p)).sum(-1),
        "margin": top[..., -1] - top[..., -2],
    }
    tau = np.quantile(value[score], 0.7)
    leave = value[score] >= tau
    wanted = np.where(leave.any(0), leave.argmax(0), Y)
    zeros = jnp.zeros((Y, B))
    plan = decide(
        ConfidenceRule(score=score), jnp.asarray(logits), zeros, jnp.full((Y,), tau, jnp.float32)
    )
    np.testing.assert_array_equal(plan.exit, wanted)


def test_patience_rule_counts_agreements():
    labels = np.asarray([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 0, 1, 0]]).T
    logits = jnp.asarray(np.eye(3, dtype=np.float32)[labels])
    plan = decide(PatienceRule(), logits, jnp.zeros((5, 3)), jnp.full((5,), 2.0))
    np.testing.assert_array_equal(plan.exit, [2, 3, 5])


def test_unknown_options_are_refused(unchecked):
    logits, ones = jnp.zeros((2, 1, 3)), jnp.ones((2, 1))
    with pytest.raises(DyncompError, match="'ce', 'error'"):
        exit_loss(logits, jnp.zeros((1,), jnp.int32), "wrong")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'boosted_sg'"):
        head_loss(ones, ones, "boosted")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'descending'"):
        MultiExitObjective(weights="flat")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="'confidence'"):
        JointExitObjective(target_score="p")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="period=0"):
        JointExitObjective(period=0)
    with pytest.raises(DyncompError, match="steps=0"):
        RampedExitObjective(steps=0)
    with pytest.raises(DyncompError, match="one to each of 2"):
        RampedExitObjective(steps=1, targets=(1.0,)).weights(0, np.ones(3))
    with pytest.raises(DyncompError, match="max_p"):
        ConfidenceRule(score="maximum")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="official_identity"):
        JointExitObjective(reweight="official")  # type: ignore[arg-type]
    with pytest.raises(DyncompError, match="classes"):
        ExitBank(exits=2, classes=1).init(jax.random.key(0), jnp.zeros((2, 1, 3)))


# 8


def test_expected_cost_is_the_cost_of_sampled_exits():
    gates = draw(15, Y, 1, high=0.35)
    mass = np.asarray(exit_mass(jnp.asarray(gates)))[:, 0].astype(np.float64)
    mass = np.append(mass, 1 - mass.sum())
    costs = np.linspace(0.2, 1.0, Y + 1)
    hazard = np.append(np.asarray(hazards(jnp.asarray(gates)))[:, 0], 1.0)
    rng = np.random.default_rng(16)
    # Sampled one exit after the other from the hazards, not from the masses.
    leave = rng.uniform(size=(100_000, Y + 1)) < hazard
    sampled = costs[leave.argmax(1)]
    assert abs(sampled.mean() - mass @ costs) < 5 * sampled.std() / math.sqrt(len(sampled))


def test_one_head_alone_equals_the_bank(problem):
    params, features, *_ = problem
    bank = ExitBank(exits=Y, classes=C)
    logits, gates = bank.apply({"params": params}, features)
    for index in range(Y):
        one, gate = bank.apply({"params": params}, features[index], index)
        np.testing.assert_allclose(one, logits[index], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gate, gates[index], rtol=1e-5, atol=1e-6)
    head = np.asarray(features[2], np.float64) @ np.asarray(
        params["heads"]["logits_kernel"][2], np.float64
    )
    np.testing.assert_allclose(logits[2], head, rtol=1e-4, atol=1e-5)


def test_bank_with_a_hidden_layer_and_no_gates():
    bank = ExitBank(exits=2, classes=3, hidden=4, gated=False)
    features = jnp.ones((2, 5, D))
    variables = jax.jit(bank.init)(jax.random.key(1), features)
    logits, gates = bank.apply(variables, features)
    assert logits.shape == (2, 5, 3) and np.all(np.asarray(gates) == 0)
    assert set(bank.cost(D)) == {"heads"}
    assert bank.cost(D)["heads"].flops == 2 * (D * 4 + 4 * 3)


def test_one_head_for_all_exits():
    bank = ExitBank(exits=3, classes=4, shared=True, gated=False)
    features = jnp.asarray(draw(5, 3, 2, D))
    params = nn.meta.unbox(jax.jit(bank.init)(jax.random.key(0), features))
    heads = params["params"]["heads"]
    assert heads["logits_kernel"].shape == (1, D, 4)
    logits, _ = bank.apply(params, features)
    kernel = np.asarray(heads["logits_kernel"][0], np.float64)
    np.testing.assert_allclose(logits, np.asarray(features, np.float64) @ kernel, atol=1e-5)
    alone, _ = bank.apply(params, features[1], 1)
    np.testing.assert_array_equal(alone, logits[1])
