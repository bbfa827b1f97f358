"""Losses of routers against numbers derived by hand and by numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from dyncomp.core import choose
from dyncomp.core.plans import RoutePlan
from dyncomp.routers import (
    balance_loss,
    heterogeneous_loss,
    imbalance,
    importance_loss,
    load_loss,
    z_loss,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 6)).astype(np.float32)
P = np.exp(LOGITS.astype(np.float64))
P /= P.sum(axis=1, keepdims=True)
MASK = (jnp.arange(40) < 31).astype(jnp.float32)


def test_balance_disagrees_with_its_bound_on_three_tokens():
    """Hard f and soft P of (.51,.49), (.51,.49), (0,1): f = (2/3, 1/3), P = (.34, .66): 2 (.2267 + .22) = 0.8933."""
    p = jnp.float32([[0.51, 0.49], [0.51, 0.49], [0.0, 1.0]])
    np.testing.assert_allclose(balance_loss(p, choose.top_k(p, 1)), 0.893333, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_k_or_one_where_probabilities_are_uniform(k):
    p = jnp.full((8, 4), 0.25)
    plan = choose.top_k(p, k)
    np.testing.assert_allclose(balance_loss(p, plan), k, rtol=1e-6)
    np.testing.assert_allclose(balance_loss(p, plan, choices="first"), 1.0, rtol=1e-6)


@pytest.mark.parametrize("choices", ["all", "first"])
def test_balance_against_numpy_with_padding(choices):
    plan = choose.top_k(jnp.asarray(P, jnp.float32), 2)
    found = balance_loss(jnp.asarray(P, jnp.float32), plan.masked(MASK), MASK, choices=choices)
    real = P[:31]
    order = np.argsort(-real, axis=1)[:, : 2 if choices == "all" else 1]
    f = np.bincount(order.ravel(), minlength=6) / 31
    np.testing.assert_allclose(found, 6 * (f * real.mean(axis=0)).sum(), rtol=1e-5)


def test_balance_gradient_flows_through_probabilities_only():
    p = jnp.asarray(P, jnp.float32)
    plan = choose.top_k(p, 2)
    f = np.asarray(plan.load(6)) / 40
    found = jax.grad(lambda p: balance_loss(p, plan))(p)
    np.testing.assert_allclose(found, np.broadcast_to(6 * f / 40, (40, 6)), rtol=1e-5)


def test_heterogeneous_at_uniform_routing_is_k_n_plus_tau_z_over_n_squared():
    """MoE++, unit property 7, with 8 networks and 4 free experts."""
    n, z, tau = 8, 4, 0.25
    p = jnp.full((24, 12), 1 / 12)
    experts = jnp.asarray([[i % 12, (i + 1) % 12] for i in range(24)], jnp.int32)
    plan = RoutePlan(experts, jnp.full((24, 2), 0.5), jnp.ones((24, 2), bool))
    weights = jnp.float32([1.0] * n + [tau] * z)
    expected = 2 * (n + tau * z) / 12**2
    np.testing.assert_allclose(heterogeneous_loss(p, plan, weights), expected, rtol=1e-5)


def test_heterogeneous_minimum_is_inversely_proportional_to_the_weights():
    """With f following P: minimise sum w_i P_i^2 on the simplex; the Lagrangian gives P_i ~ 1/w_i."""
    w = np.array([1.0, 1.0, 0.5, 0.25])
    best = (1 / w) / (1 / w).sum()
    value = lambda p: (w * p * p).sum()
    for _ in range(50):
        other = RNG.dirichlet(np.ones(4))
        assert value(best) <= value(other) + 1e-12


def test_imbalance_by_hand():
    plan = RoutePlan(
        jnp.asarray([[0, 1], [0, 2], [0, 3]], jnp.int32), jnp.ones((3, 2)), jnp.ones((3, 2), bool)
    )
    assert float(imbalance(plan, 4)) == pytest.approx(3 / 1.5)


def test_importance_is_the_squared_coefficient_of_variation():
    real = P[:31].sum(axis=0)
    expected = real.var() / real.mean() ** 2
    np.testing.assert_allclose(
        importance_loss(jnp.asarray(P, jnp.float32), MASK), expected, rtol=1e-4
    )


@pytest.mark.parametrize("leave_out", [False, True])
def test_load_against_numpy(leave_out):
    noisy = LOGITS + RNG.normal(size=LOGITS.shape).astype(np.float32) / 6
    ordered = -np.sort(-noisy, axis=1)
    threshold = np.repeat(ordered[:, 1:2], 6, axis=1)
    if leave_out:  # the second highest of the OTHERS
        for e in range(6):
            rest = np.delete(noisy, e, axis=1)
            threshold[:, e] = -np.sort(-rest, axis=1)[:, 1]
    chosen = norm.cdf((LOGITS - threshold) * 6).sum(axis=0)
    expected = chosen.var() / chosen.mean() ** 2
    std = jnp.full((1, 1), 1 / 6)
    found = load_loss(jnp.asarray(LOGITS), jnp.asarray(noisy), std, 2, leave_out=leave_out)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_load_left_out_is_the_probability_of_selection_when_one_noise_is_drawn_again():
    """Monte Carlo over expert 0's noise alone."""
    clean = np.array([[0.3, 0.1, -0.2, 0.4]], np.float32)
    noise = np.array([[0.0, 0.2, -0.1, 0.05]], np.float32)
    noisy = clean + noise
    draws = clean[0, 0] + 0.5 * RNG.normal(size=200_000)
    second = np.sort(noisy[0, 1:])[-2]
    exact = norm.cdf((clean[0, 0] - second) / 0.5)
    assert abs((draws > second).mean() - exact) < 0.005


def test_z_loss_gradient():
    """d mean(lse^2) / d h = 2 lse softmax(h) / T."""
    lse = np.log(np.exp(LOGITS.astype(np.float64)).sum(axis=1, keepdims=True))
    found = jax.grad(z_loss)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(found, 2 * lse * P / 40, rtol=1e-4, atol=1e-7)
