import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyncomp.core.errors import DyncompError
from dyncomp.routers import DistilledRouter, Hindsight, imitation_loss, winners_loss
from dyncomp.routers.imitation import Outputs, best_subset, nearest_label, slice_errors

E, N, D = 4, 11, 6
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
SLICES = RNG.normal(size=(E, N, D))
OUTPUTS = Outputs(jnp.asarray(SLICES, jnp.float32), jnp.asarray(SLICES.sum(0), jnp.float32))


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl(r, q):
    return (r * np.log(r / q)).sum(-1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_errors_and_label_against_loops_over_rows_and_slices(k):
    errors = slice_errors(OUTPUTS, k)
    label = nearest_label(errors, jnp.int32(k))
    for n in range(N):
        share = SLICES[:, n].sum(0) * k / E
        m = [np.mean((SLICES[j, n] - share) ** 2) for j in range(E)]
        np.testing.assert_allclose(errors[n], m, rtol=1e-5)
        assert set(np.flatnonzero(label[n])) == set(np.argsort(m)[:k])
    assert (label.sum(-1) == k).all() and set(np.unique(label)) <= {0.0, 1.0}


@pytest.mark.parametrize(("e", "k"), [(4, 2), (4, 1), (8, 3), (4, 4)])
def test_target_of_the_label_has_two_values(e, k):
    label = nearest_label(jnp.asarray(RNG.uniform(size=(5, e)), jnp.float32), k)
    q, high = np.asarray(jax.nn.softmax(label)), np.e / (k * np.e + e - k)
    np.testing.assert_allclose(q[np.asarray(label) == 1], high, rtol=1e-6)
    np.testing.assert_allclose(q[np.asarray(label) == 0], 1 / (k * np.e + e - k), rtol=1e-6)
    if (e, k) == (4, 2):
        np.testing.assert_allclose([high, high / np.e], [0.36553, 0.13447], atol=5e-6)


def test_loss_values_and_direction():
    label = jnp.float32([[1, 1, 0, 0]])
    a, b = np.e / (2 * np.e + 2), 1 / (2 * np.e + 2)
    q, uniform = np.array([a, a, b, b]), np.full(4, 0.25)
    found = imitation_loss(jnp.zeros((1, 4)), label)
    np.testing.assert_allclose(found, kl(uniform, q), rtol=1e-5)
    np.testing.assert_allclose(found, 0.120, atol=5e-4)
    other = imitation_loss(jnp.zeros((1, 4)), label, direction="label")
    np.testing.assert_allclose(other, kl(q, uniform), rtol=1e-5)
    # at uniform r: log(cosh(1/2)) = 0.12011 one way, log 2 - H(q's halves) = 0.11094 the other
    np.testing.assert_allclose([found, other], [0.12011, 0.11094], atol=1e-5)
    assert abs(float(imitation_loss(label, label))) < 1e-6  # r = q
    assert abs(float(imitation_loss(label + 3.0, label, direction="label"))) < 1e-6


def test_loss_is_never_negative_and_is_a_mean_over_real_rows_of_any_batch():
    logits = jnp.asarray(RNG.normal(size=(64, E)) * 30, jnp.float32)  # past the clip
    label = nearest_label(jnp.asarray(RNG.uniform(size=(64, E)), jnp.float32), 2)
    r, q = (np.clip(softmax(np.asarray(v, np.float64)), 1e-7, 1 - 1e-7) for v in (logits, label))
    each = kl(r, q)
    assert each.min() > -1e-6
    np.testing.assert_allclose(imitation_loss(logits, label), each.mean(), rtol=1e-4)
    mask = jnp.asarray(np.arange(64) < 10, jnp.float32)
    np.testing.assert_allclose(imitation_loss(logits, label, mask), each[:10].mean(), rtol=1e-4)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        imitation_loss(logits, label, mask)


def test_winners_by_hand_and_gradients():
    logits = jnp.log(jnp.float32([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]))
    np.testing.assert_allclose(winners_loss(logits, 2), (0.8 / 4 + 0.7 / 4) / 2, rtol=1e-5)
    label = jnp.float32([[1, 1, 0, 0], [0, 1, 0, 1]])
    for direction in ("router", "label"):
        loss = lambda z, d=direction: imitation_loss(jnp.asarray(z), label, direction=d)
        check_grads(loss, (logits,), 1, ("fwd", "rev"), atol=1e-2, rtol=1e-2, eps=1e-3)
    check_grads(
        lambda z: winners_loss(jnp.asarray(z), 2), (logits,), 1, ("rev",), atol=1e-2, rtol=1e-2
    )
    # d KL(r || q) / d z_j = r_j (log(r_j / q_j) - KL)
    z = np.asarray(logits, np.float64)
    r, q = softmax(z), softmax(np.asarray(label, np.float64))
    expected = r * (np.log(r / q) - kl(r, q)[:, None]) / 2
    np.testing.assert_allclose(
        jax.grad(lambda z: imitation_loss(z, label))(logits), expected, atol=1e-6
    )


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_best_subset_against_all_combinations(k, rescale):
    found = np.asarray(best_subset(OUTPUTS, jnp.int32(k), rescale=rescale))
    scale = E / k if rescale else 1.0
    for n in range(N):
        t = SLICES[:, n].sum(0)
        sums = {s: ((scale * SLICES[list(s), n].sum(0) - t) ** 2).sum()
                for s in itertools.combinations(range(E), k)}  # fmt: skip
        # a set of half the slices and its complement tie when rescaled, so errors are compared
        np.testing.assert_allclose(
            sums[tuple(np.flatnonzero(found[n]))], min(sums.values()), rtol=1e-5, atol=1e-10
        )


def test_at_one_slice_with_the_factor_both_bounds_choose_alike():
    label = nearest_label(slice_errors(OUTPUTS, 1), 1)
    np.testing.assert_array_equal(label, best_subset(OUTPUTS, 1))


def make(**options):
    router = DistilledRouter(num_experts=E, **options)
    return router, nn.unbox(jax.jit(router.init)(jax.random.key(1), X))


def test_plan_is_the_highest_scores_of_the_linear_map_and_k_recompiles_nothing(counting_jit):
    router, variables = make(k=2)
    variables["params"]["bias"] = jnp.float32([0.3, -0.2, 0.1, 0.0])
    params = {n: np.asarray(v, np.float64) for n, v in variables["params"].items()}
    order = np.argsort(-(np.asarray(X, np.float64) @ params["kernel"] + params["bias"]), axis=1)
    run, traces = counting_jit(lambda k: router.apply({**variables, "controls": {"k": k}}, X)[0])
    for k in (1, 2, 3, 4):
        plan = run(jnp.int32(k))
        assert (plan.counts() == k).all()
        np.testing.assert_array_equal(plan.experts[:, :k], order[:, :k])
        np.testing.assert_array_equal(plan.weights, np.asarray(plan.keep, np.float32))
    assert len(traces) == 1
    assert (run(jnp.int32(9)).counts() == E).all()  # beyond the slots acts like all of them
    assert make(k=1, max_k=2)[0].apply(variables, X)[0].experts.shape == (N, 2)


def test_losses_only_while_it_sees_outputs_and_only_into_the_router():
    router, variables = make()
    mask = (jnp.arange(N) < 7).astype(jnp.float32)
    plan, losses = router.apply(variables, X, mask)
    assert all(np.isnan(v) for v in losses.values()) and set(losses) == {"imitation", "winners"}
    assert (np.asarray(plan.counts()) == np.where(np.arange(N) < 7, 2, 0)).all()

    def total(params, x, outputs, detach=True):
        router = DistilledRouter(num_experts=E, detach=detach)
        found = router.apply({**variables, "params": params}, x, mask, True, outputs)[1]
        return found["imitation"] + found["winners"]

    grads = jax.grad(total, (0, 1, 2))(variables["params"], X, OUTPUTS)
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(grads[0]))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads[1:]))
    open_ = jax.grad(total, 1)(variables["params"], X, OUTPUTS, False)
    assert (np.asarray(open_)[:7] != 0).any() and (np.asarray(open_)[7:] == 0).all()
    padded = X.at[7:].set(99.0)
    np.testing.assert_allclose(
        total(variables["params"], X, OUTPUTS), total(variables["params"], padded, OUTPUTS)
    )


@pytest.mark.parametrize("by", ["slice", "subset"])
def test_hindsight_takes_what_its_name_says(by):
    plan, _ = Hindsight(num_experts=E, k=3, by=by).init_with_output(
        jax.random.key(0), X, outputs=OUTPUTS
    )[0]
    wanted = (
        best_subset(OUTPUTS, 3) if by == "subset" else nearest_label(slice_errors(OUTPUTS, 3), 3)
    )
    np.testing.assert_array_equal(plan.one_hot(E), wanted)


@pytest.mark.parametrize(
    ("router", "word"),
    [
        (DistilledRouter(num_experts=2, k=3), "max_k"),
        (DistilledRouter(num_experts=4, k=2, max_k=1), "max_k"),
        (Hindsight(num_experts=2, k=1), "SlicedFFN"),
    ],
)
def test_bad_options(router, word):
    with pytest.raises(DyncompError, match=word):
        router.init(jax.random.key(0), X)
