"""Boxes around keys and scores of clusters, against sums written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.attention.boxes import blank, boxes_of, grown, scores_of

B, S, G, H, P, SIZE = 2, 11, 2, 4, 5, 4
COUNT = jnp.asarray([11, 6], jnp.int32)


def keys(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, S, G, P))


def query(seed=1):
    return jax.random.normal(jax.random.key(seed), (B, H, P))


def test_boxes_hold_real_keys_only():
    """The last cluster of row 0 has 3 keys, row 1 has 4 + 2 keys and an empty cluster."""
    k = np.asarray(keys())
    got = boxes_of(keys(), COUNT, SIZE, 0.25)
    for row, (start, stop) in ((0, (8, 11)), (1, (4, 6))):
        cluster = start // SIZE
        high, low = k[row, start:stop].max(0), k[row, start:stop].min(0)
        np.testing.assert_allclose(got.high[row, cluster], high)
        np.testing.assert_allclose(got.low[row, cluster], low)
        np.testing.assert_allclose(got.centre[row, cluster], 0.25 * high + 0.75 * low, rtol=1e-6)
    assert not got.high[1, 2].any() and not got.centre[1, 2].any()
    means = boxes_of(keys(), COUNT, SIZE, None)
    np.testing.assert_allclose(means.centre[1, 1], k[1, 4:6].mean(0), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.6, None])
def test_growing_key_by_key_is_making_them_at_once(alpha):
    """Row 1 pauses: where it is not real nothing changes."""
    state, slot = blank(B, 3, G, P, "float32"), np.zeros(2, np.int32)
    step = jax.jit(lambda s, k, at, real: grown(s, k, at, SIZE, alpha, real))
    for turn in range(S):
        real = np.asarray([True, turn % 2 == 0])
        key = keys()[jnp.arange(B), jnp.asarray(slot)]
        state = step(state, key, jnp.asarray(slot), jnp.asarray(real))
        slot = slot + real
    assert slot.tolist() == COUNT.tolist()
    want = boxes_of(keys(), COUNT, SIZE, alpha)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_bound_is_one_and_the_linear_score_never_exceeds_it():
    """Property 2, for each group of heads: best <= bound, and linear <= bound for every alpha."""
    q, k = query(), keys()
    held = (k, COUNT, SIZE)
    some = np.arange(3)[None] * SIZE < np.asarray(COUNT)[:, None]
    some = np.broadcast_to(some[:, None], (B, G, 3))
    bound = np.asarray(scores_of(q, boxes_of(k, COUNT, SIZE, 0.5), "bound"))
    best = np.asarray(scores_of(q, boxes_of(k, COUNT, SIZE, 0.5), "best", held))
    assert np.all(bound[some] >= best[some] - 1e-5)
    for alpha in (0.0, 0.3, 0.6, 1.0):
        own = boxes_of(k, COUNT, SIZE, alpha)
        assert np.all(bound >= np.asarray(scores_of(q, own, "linear")) - 1e-5)


def test_bound_and_best_by_hand():
    q, k = np.asarray(query(), np.float64), np.asarray(keys(), np.float64)
    boxes = boxes_of(keys(), COUNT, SIZE, 0.5)
    bound = scores_of(query(), boxes, "bound")
    best = scores_of(query(), boxes, "best", (keys(), COUNT, SIZE))
    for row, cluster, members in ((0, 2, slice(8, 11)), (1, 1, slice(4, 6))):
        for g in range(G):
            own, heads = k[row, members, g], q[row, 2 * g : 2 * g + 2]
            high, low = own.max(0), own.min(0)
            want = sum(np.maximum(x * high, x * low).sum() for x in heads)
            np.testing.assert_allclose(bound[row, g, cluster], want, rtol=1e-5)
            want = sum((own @ x).max() for x in heads)
            np.testing.assert_allclose(best[row, g, cluster], want, rtol=1e-5)


def test_the_bound_is_linear_at_the_ends_of_alpha():
    """Equal for alpha = 1 where q >= 0 and for alpha = 0 where q <= 0."""
    for alpha, q in ((1.0, jnp.abs(query())), (0.0, -jnp.abs(query()))):
        own = boxes_of(keys(), COUNT, SIZE, alpha)
        np.testing.assert_allclose(
            scores_of(q, own, "bound"), scores_of(q, own, "linear"), rtol=1e-5, atol=1e-5
        )


def test_the_linear_score_is_linear():
    """Property 3."""
    own, q, other = boxes_of(keys(), COUNT, SIZE, 0.6), query(), query(2)
    both = scores_of(q + other, own, "linear")
    np.testing.assert_allclose(
        both, scores_of(q, own, "linear") + scores_of(other, own, "linear"), rtol=1e-4, atol=1e-5
    )


def test_one_key_a_cluster_makes_all_scores_products():
    """Property 7."""
    count = jnp.full((B,), S, jnp.int32)
    q, k = np.asarray(query()), np.asarray(keys())
    want = np.einsum("bgrp,bsgp->bgs", q.reshape(B, G, 2, P), k)
    for alpha in (0.0, 0.6):
        own = boxes_of(keys(), count, 1, alpha)
        for kind in ("linear", "bound", "best"):
            held = (keys(), count, 1) if kind == "best" else None
            np.testing.assert_allclose(scores_of(query(), own, kind, held), want, atol=1e-5)


def test_random_scores_change_with_the_query():
    own = boxes_of(keys(), COUNT, SIZE, 0.6)
    a, b = (scores_of(query(seed), own, "random") for seed in (1, 2))
    assert a.shape == (B, G, 3) and not np.array_equal(a, b)
    np.testing.assert_array_equal(a, scores_of(query(1), own, "random"))
