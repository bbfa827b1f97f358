"""Fusion of logits against brute force over the definition in float64 (scipy's relative entropy)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from dyncomp.core.errors import DyncompError
from dyncomp.decoding import (
    FusionPlan,
    alpha_grid,
    choose_fusion,
    displacement,
    fuse,
    fused_logits,
    kl_divergence,
    logit_shifts,
    mismatch,
)

B, V, T = 16, 24, 3
RNG = np.random.default_rng(0)
GRID = jnp.asarray(alpha_grid())
score = jax.jit(mismatch, static_argnames="terms")
choose = jax.jit(choose_fusion, static_argnames="terms")
move = jax.jit(jax.vmap(displacement, (None, None, 0)))


@pytest.fixture(autouse=True)
def strictly(strict):
    """No implicit promotion anywhere in this file."""


def float32(values):
    return jnp.asarray(values, jnp.float32)


@pytest.fixture(scope="module")
def logits():
    """(large, base, experts), experts near the base as fine-tuned models are."""
    large, base = RNG.normal(size=(2, B, V)) * 2
    experts = base + RNG.normal(size=(T, B, V)) * np.asarray([0.5, 1.0, 2.0])[:, None, None]
    return float32(large), float32(base), float32(experts)


def exact_mismatch(large, base, experts, grid, terms="both"):
    """J by its definition, float64: [b t g]."""
    large, base, experts, grid = (np.asarray(x, np.float64) for x in (large, base, experts, grid))
    p, q, own = softmax(large, -1), softmax(base, -1), softmax(experts, -1)
    targets = entropy(own, q, axis=-1), entropy(q, own, axis=-1)  # [t b]
    j = np.zeros((len(large), len(experts), len(grid)))
    for t, g in np.ndindex(*j.shape[1:]):
        fused = softmax(large + grid[g] * (experts[t] - base), -1)
        first = entropy(fused, p, axis=-1) - targets[0]
        second = entropy(p, fused, axis=-1) - targets[1]
        j[:, t, g] += (terms != "from_base") * (first**2).sum(0)
        j[:, t, g] += (terms != "from_fused") * (second**2).sum(0)
    return j


def test_grid_holds_its_ends():
    grid = alpha_grid()
    assert grid.dtype == np.float32 and len(grid) == 21
    assert grid[0] == 0 and grid[10] == 1 and grid[20] == 2
    np.testing.assert_array_equal(grid, np.float32([f"{i / 10:.1f}" for i in range(21)]))
    fine = alpha_grid(2.0, 100)
    assert fine[50] == 1 and fine[100] == 2
    with pytest.raises(DyncompError, match="steps=0"):
        alpha_grid(1.0, 0)


@pytest.mark.parametrize(("v", "atol"), [(256, 1e-6), (49_152, 5e-5)])
def test_kl_in_float64(v, atol):
    a, b = RNG.normal(size=(2, 4, v)).astype(np.float32)
    log_p, log_q = jax.nn.log_softmax(float32(a)), jax.nn.log_softmax(float32(b))
    p, q = softmax(a.astype(np.float64), -1), softmax(b.astype(np.float64), -1)
    wanted = entropy(p, q, axis=-1)
    np.testing.assert_allclose(kl_divergence(log_p, log_q), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(("v", "atol"), [(256, 2e-6), (49_152, 5e-5)])
def test_displacement_in_float64(v, atol):
    logits, shift = RNG.normal(size=(2, v)).astype(np.float32) * np.float32([[2], [1]])
    ours = move(float32(logits), float32(shift), GRID)
    p = softmax(logits.astype(np.float64))
    for alpha, first, second in zip(np.float64(GRID), *ours, strict=True):
        moved = softmax(logits.astype(np.float64) + alpha * shift.astype(np.float64))
        assert float(first) == pytest.approx(entropy(moved, p), abs=atol)
        assert float(second) == pytest.approx(entropy(p, moved), abs=atol)
    # Both grow with alpha, from exactly zero.
    for values in np.asarray(ours):
        assert values[0] == 0 and (np.diff(values) >= -1e-6).all()


def test_mismatch_is_its_definition(logits):
    for terms in ("both", "from_fused", "from_base"):
        ours = score(*logits, GRID, terms=terms)
        wanted = exact_mismatch(*logits, GRID, terms)
        np.testing.assert_allclose(ours, wanted, rtol=2e-4, atol=1e-5)


def test_choice_is_the_smallest_over_the_grid(logits):
    exact = exact_mismatch(*logits, GRID)
    plan = choose(*logits, GRID)
    expert, place = np.unravel_index(exact.reshape(B, -1).argmin(-1), exact.shape[1:])
    np.testing.assert_array_equal(plan.expert, expert)
    np.testing.assert_array_equal(plan.alpha, np.asarray(GRID)[place])
    np.testing.assert_allclose(plan.mismatch, exact.reshape(B, -1).min(-1), rtol=1e-3, atol=1e-5)
    assert plan.expert.dtype == jnp.int32 and len(set(plan.alpha.tolist())) > 3
    assert len(set(plan.expert.tolist())) > 1


def test_rows_and_steps_do_not_see_each_other(logits):
    large, base, experts = logits
    whole = choose(*logits, GRID)
    order = RNG.permutation(B)
    mixed = choose(large[order], base[order], experts[:, order], GRID)
    for name in ("expert", "alpha", "mismatch"):
        np.testing.assert_array_equal(getattr(whole, name)[order], getattr(mixed, name))
    # A row that fits perfectly (J = 0) leaves the others as they are.
    perfect = choose(large.at[0].set(base[0]), base, experts[:1], GRID)
    alone = choose(large, base, experts[:1], GRID)
    np.testing.assert_array_equal(perfect.alpha[1:], alone.alpha[1:])


def test_alpha_zero_is_the_large_model_bit_for_bit(logits):
    large, base, experts = logits
    plan = FusionPlan(jnp.ones(B, jnp.int32), jnp.zeros(B), jnp.zeros(B))
    np.testing.assert_array_equal(fuse(large, base, experts, plan), large)


def test_an_expert_that_learned_nothing_is_not_added(logits):
    large, base, _ = logits
    plan = choose(large, base, base[None], GRID)
    assert (plan.alpha == 0).all() and (plan.mismatch == 0).all()
    everything = plan.replace(alpha=jnp.full(B, 1.7, jnp.float32))
    np.testing.assert_array_equal(fuse(large, base, base[None], everything), large)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 3.0])
def test_equal_bases_give_exactly_one(scale):
    base = RNG.normal(size=(50, V)) * 2
    expert = float32(base + scale * RNG.normal(size=(50, V)))
    base = float32(base)
    plan = choose(base, base, expert[None], GRID)
    assert (plan.alpha == 1).all() and (plan.mismatch < 1e-10).all()
    fused = jax.nn.softmax(fuse(base, base, expert[None], plan))
    np.testing.assert_allclose(fused, jax.nn.softmax(expert), atol=1e-6)


def test_constants_change_nothing(logits):
    large, base, experts = logits
    plain = score(*logits, GRID)
    for moved in (
        (large + 7.0, base, experts),
        (large, base - 5.0, experts),
        (large, base, experts + 3.0),
    ):
        np.testing.assert_allclose(score(*moved, GRID), plain, rtol=1e-3, atol=1e-4)


def test_minimum_lies_between_the_roots_of_the_two_terms():
    found = 0
    for _ in range(40):
        large, base, shift = RNG.normal(size=(3, V))
        p, q, q_t = softmax(large), softmax(base), softmax(base + shift)
        moved = lambda alpha: softmax(large + alpha * shift)
        first = lambda alpha: entropy(moved(alpha), p) - entropy(q_t, q)
        second = lambda alpha: entropy(p, moved(alpha)) - entropy(q, q_t)
        if first(8.0) <= 0 or second(8.0) <= 0:
            continue  # the first term is bounded: it may have no root
        roots = sorted(brentq(f, 0, 8) for f in (first, second))
        grid = float32(np.linspace(0, 8, 1601))
        args = (float32(x)[None] for x in (large, base))
        plan = choose(*args, float32(base + shift)[None, None], grid)
        assert roots[0] - 6e-3 <= float(plan.alpha[0]) <= roots[1] + 6e-3
        exact = minimize_scalar(
            lambda a: first(a) ** 2 + second(a) ** 2, bounds=(0, 8), method="bounded"
        )
        assert float(plan.alpha[0]) == pytest.approx(exact.x, abs=2e-2)
        found += 1
    assert found > 20


def test_identical_experts_are_one_expert(logits):
    large, base, experts = logits
    one = choose(large, base, experts[:1], GRID)
    three = choose(large, base, jnp.stack([experts[0]] * 3), GRID)
    assert (three.expert == 0).all()
    np.testing.assert_array_equal(one.alpha, three.alpha)
    np.testing.assert_allclose(three.mismatch, 3 * one.mismatch, rtol=1e-3, atol=1e-7)


def test_permuting_experts_permutes_the_choice(logits):
    large, base, experts = logits
    plan, order = choose(*logits, GRID), np.asarray([2, 0, 1])
    permuted = choose(large, base, experts[order], GRID)
    np.testing.assert_array_equal(order[np.asarray(permuted.expert)], plan.expert)
    np.testing.assert_array_equal(permuted.alpha, plan.alpha)


def test_one_grid_value_is_proxy_tuning(logits):
    large, base, experts = logits
    for alpha in (0.5, 1.0):
        plan = choose(large, base, experts[:1], float32([alpha]))
        ours = fuse(large, base, experts[:1], plan)
        wanted = np.float64(large) + alpha * (np.float64(experts[0]) - np.float64(base))
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_joint_fusion_adds_every_shift(logits):
    large, base, experts = logits
    alphas = float32(RNG.uniform(0, 2, (T, B)))
    ours = fused_logits(large, logit_shifts(base, experts), alphas)
    wanted = np.float64(large) + np.einsum(
        "tb,tbv->bv", np.float64(alphas), np.float64(experts) - np.float64(base)
    )
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_padded_vocabularies(logits):
    """Tokens that only some models have are out: as if they had never been there."""
    large, base, experts = logits
    wide = lambda x, fill: jnp.concatenate([x, jnp.full((*x.shape[:-1], 2), fill)], -1)
    allowed = jnp.arange(V + 2) < V
    padded = wide(large, 4.0), wide(base, -jnp.inf), wide(experts, 2.0)
    plan = choose(*padded, GRID, allowed=allowed)
    plain = choose(*logits, GRID)
    np.testing.assert_array_equal(plan.expert, plain.expert)
    np.testing.assert_array_equal(plan.alpha, plain.alpha)
    np.testing.assert_allclose(plan.mismatch, plain.mismatch, rtol=1e-3, atol=1e-6)
    fused = fuse(*padded, plan, allowed=allowed)
    assert (fused[:, V:] == -jnp.inf).all() and np.isfinite(fused[:, :V]).all()
    # Where all have -inf no mask is needed.
    gone = [wide(x, -jnp.inf) for x in logits]
    assert np.isfinite(choose(*gone, GRID).mismatch).all()
    np.testing.assert_array_equal(choose(*gone, GRID).alpha, choose(*logits, GRID).alpha)


def test_a_grid_is_no_new_program(logits, counting_jit):
    search, traces = counting_jit(choose_fusion)
    search(*logits, GRID)
    search(*logits, GRID * 0.5)
    assert len(traces) == 1


def test_half_precision_logits_are_taken_in_float32(logits):
    narrow = [x.astype(jnp.bfloat16) for x in logits]
    plan = choose(*narrow, GRID)
    wide = choose(*(x.astype(jnp.float32) for x in narrow), GRID)
    np.testing.assert_array_equal(plan.alpha, wide.alpha)
    assert fuse(*narrow, plan).dtype == jnp.float32


def test_unknown_terms_are_refused(logits, unchecked):
    with pytest.raises(DyncompError, match="terms='first'"):
        mismatch(*logits, GRID, terms="first")


def test_log_space_reference_agrees_with_itself():
    """The float64 reference of this file: the closed form in numpy equals scipy's sum."""
    logits, shift = RNG.normal(size=(2, V))
    log_p, log_m = log_softmax(logits), log_softmax(logits + 1.3 * shift)
    moment = np.log((np.exp(log_p) * np.exp(1.3 * shift)).sum())
    closed = 1.3 * (np.exp(log_m) * shift).sum() - moment
    assert closed == pytest.approx(entropy(np.exp(log_m), np.exp(log_p)))
