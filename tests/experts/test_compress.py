import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.experts import MoE
from dyncomp.experts.compress import (
    align,
    group_experts,
    logit_similarity,
    merge_experts,
    most_used,
    prune_experts,
    reordered,
    weight_similarity,
)
from dyncomp.routers import Grouped, PrunedTopK, SkipSecond, TopK
from dyncomp.routers.reduced import grouped_plan, median_ratio

D, F, E = 6, 5, 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 9, D)), jnp.float32)


def expert(seed):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def stacked(experts):
    return {n: np.stack([e[n] for e in experts]) for n in experts[0]}


def test_alignment_undoes_a_shuffle_and_is_the_best_of_all_orders():
    one, order = expert(1), RNG.permutation(F)
    found = align(one, reordered(one, order))
    for name, leaf in reordered(reordered(one, order), found).items():
        np.testing.assert_array_equal(leaf, one[name])
    other = expert(2)
    far = lambda p: sum(((reordered(other, np.array(p))[n] - one[n]) ** 2).sum() for n in one)
    best = min(itertools.permutations(range(F)), key=far)
    np.testing.assert_array_equal(align(one, other), best)


def test_groups_are_led_by_the_most_used():
    similarity = np.array(
        [[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0], [0.1, 0.3, 1, 0.8], [0.2, 0, 0.8, 1]]
    )
    assert group_experts(similarity, [1, 5, 2, 4], 2).tolist() == [0, 0, 1, 1]
    assert group_experts(similarity, [1, 5, 2, 4], 4).tolist() == [0, 1, 2, 3]
    assert group_experts(similarity, [9, 5, 0, 0], 2).tolist() == [0, 1, 1, 0]
    with pytest.raises(DyncompError, match="groups"):
        group_experts(similarity, [1, 1, 1, 1], 5)
    logits = RNG.normal(size=(20, 3))
    logits = np.concatenate([logits, 2 * logits[:, :1]], axis=1)
    np.testing.assert_allclose(logit_similarity(logits)[0, 3], 1.0)
    bank = stacked([expert(0), expert(1), expert(0)])
    np.testing.assert_allclose(weight_similarity(bank)[0, 2], 1.0)


def test_gates_of_one_group_add_up_in_its_first_slot():
    plan = RoutePlan(
        jnp.int32([[0, 3, 1], [2, 1, 0]]),
        jnp.float32([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]),
        jnp.array([[True, True, True], [True, True, False]]),
    )
    found = grouped_plan(plan, jnp.int32([0, 0, 1, 1]))
    np.testing.assert_allclose(found.one_hot(2), [[0.7, 0.3], [0.4, 0.6]], rtol=1e-6)
    assert found.counts().tolist() == [2, 2] and found.load(2).tolist() == [2, 2]


@pytest.mark.parametrize("renormalize", [True, False])
def test_merging_identical_experts_with_gates_added_is_exact(renormalize):
    a, b = expert(1), expert(2)
    shuffle = lambda e: reordered(e, RNG.permutation(F))
    bank = stacked([a, b, shuffle(a), shuffle(b)])  # the same functions, neurons in other orders
    router = functools.partial(TopK, k=3, renormalize=renormalize)
    old = MoE(router=router, num_experts=E, hidden=F)
    start = nn.unbox(jax.jit(old.init)(jax.random.key(0), X))["params"]
    start["router"]["kernel"] *= 30
    before, _ = old.apply({"params": {**start, **bank}}, X)

    table = np.int32([0, 1, 0, 1])
    merged = merge_experts(bank, table, [3, 1, 2, 2])
    new = MoE(
        router=functools.partial(Grouped, router=router, old_experts=E), num_experts=2, hidden=F
    )
    params = {**merged, "router": {"router": start["router"]}}
    controls = {"router": {"table": jnp.asarray(table)}}
    after, aux = new.apply({"params": params, "controls": controls}, X)
    np.testing.assert_allclose(after, before, atol=2e-5)
    assert int(aux.events["experts"]["rows"].needed) <= 2 * 18  # a group runs once a row
    plain = merge_experts(bank, table, [3, 1, 2, 2], aligned=False)
    spoiled, _ = new.apply(
        {"params": {**plain, **{"router": params["router"]}}, "controls": controls}, X
    )
    assert not np.allclose(spoiled, before, atol=1e-2)


def test_merging_weighs_by_usage():
    bank = stacked([expert(0)] * 3)
    bank["up"] = bank["up"] * np.array([1.0, 2.0, 4.0])[:, None, None]
    merged = merge_experts(bank, [0, 0, 1], [3, 1, 7], aligned=False)
    np.testing.assert_allclose(merged["up"][0], expert(0)["up"] * 1.25, rtol=1e-6)
    unused = merge_experts(bank, [0, 0, 1], [0, 0, 7], aligned=False)
    np.testing.assert_allclose(unused["up"][0], expert(0)["up"] * 1.5, rtol=1e-6)
    with pytest.raises(DyncompError, match="number them"):
        merge_experts(bank, [0, 2, 2], [1, 1, 1])


def pruned(logits, allowed, **options):
    router = PrunedTopK(num_experts=E, **options)
    kernel = jnp.eye(E, dtype=jnp.float32)
    variables = {"params": {"kernel": kernel}, "controls": {"allowed": jnp.asarray(allowed)}}
    return router.apply(variables, jnp.float32([logits]))[0].one_hot(E)[0]


def test_raw_gates_grow_without_the_pruned_denominator():
    logits, rest = [2.0, 1.0, 0.0, -1.0], [True, True, True, False]
    p = np.exp(logits) / np.exp(logits).sum()
    whole = pruned(logits, [True] * 4, k=1, renormalize=False)
    small = pruned(logits, rest, k=1, renormalize=False)
    old = pruned(logits, rest, k=1, renormalize=False, keep_denominator=True)
    np.testing.assert_allclose([whole[0], small[0], old[0]], [0.644, 0.665, 0.644], atol=5e-4)
    np.testing.assert_allclose(small[0], p[0] / p[:3].sum(), rtol=1e-5)
    for keep in (
        True,
        False,
    ):  # the best expert is gone; renormalised gates do not see the denominator
        found = pruned(logits, [False, True, True, True], k=2, keep_denominator=keep)
        np.testing.assert_allclose(
            found, [0, p[1] / p[1:3].sum(), p[2] / p[1:3].sum(), 0], rtol=1e-5
        )
    one = pruned(logits, [False, False, True, False], k=2)
    np.testing.assert_allclose(one, [0, 0, 1, 0], rtol=1e-6)


def test_pruning_experts_that_were_never_chosen_is_exact_when_gates_renormalise():
    rng = np.random.default_rng(3)
    bank = stacked([expert(i) for i in range(E)])
    moe = MoE(router=functools.partial(TopK, k=2), num_experts=E, hidden=F)
    kernel = rng.normal(size=(D, E)).astype(np.float32)
    x = jnp.concatenate([X[..., :1] ** 2 + 3, X[..., 1:]], axis=-1)
    kernel[0, 2] = -50  # the first feature is positive: expert 2 is never chosen
    layer = {**bank, "router": {"kernel": kernel}}
    before, aux = moe.apply({"params": layer}, x, capture=("plan",))
    usage = np.asarray(aux.plans["load"])
    assert usage[2] == 0 and (usage[[0, 1, 3]] > 0).all()
    keep = most_used(usage, 3)
    assert keep.tolist() == [0, 1, 3]
    small = MoE(router=functools.partial(TopK, k=2), num_experts=3, hidden=F)
    after, _ = small.apply({"params": prune_experts(layer, keep)}, x)
    np.testing.assert_allclose(after, before, atol=1e-5)
    stack = jax.tree.map(lambda a: np.stack([a, a]), layer)  # a layer axis in front
    assert prune_experts(stack, keep)["router"]["kernel"].shape == (2, D, 3)


def test_skipping_the_second_expert_by_hand_and_half_at_the_median():
    logits = jnp.log(jnp.float32([[0.5, 0.3, 0.1, 0.1], [0.6, 0.2, 0.15, 0.05]]))
    for keep, expected in ((True, [0.75, 0, 0, 0]), (False, [1.0, 0, 0, 0])):
        router = SkipSecond(num_experts=E, beta=0.5, keep_weight=keep)
        plan, _ = router.apply(
            {"params": {"kernel": jnp.eye(E)}, "controls": {"beta": jnp.float32(0.5)}}, logits
        )
        np.testing.assert_allclose(plan.one_hot(E), [[0.625, 0.375, 0, 0], expected], rtol=1e-5)
    assert SkipSecond(num_experts=E).apply({"params": {"kernel": jnp.eye(E)}}, logits, mutable=["controls"])[0][
        0
    ].counts().tolist() == [2, 2]  # fmt: skip
    rows = jnp.asarray(RNG.normal(size=(501, E)), jnp.float32)
    weights = TopK(num_experts=E).apply({"params": {"kernel": jnp.eye(E)}}, rows)[0].weights
    beta = median_ratio(weights)
    variables = {"params": {"kernel": jnp.eye(E)}, "controls": {"beta": jnp.asarray(beta)}}
    counts = np.asarray(SkipSecond(num_experts=E).apply(variables, rows)[0].counts())
    # half the rows skip, a quarter of the calls; the row at the median may round either way
    assert (counts == 1).sum() in (250, 251)
    with pytest.raises(DyncompError, match="SkipSecond"):
        SkipSecond(num_experts=E, k=3).init(jax.random.key(0), rows)
