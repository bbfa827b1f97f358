"""Attention inside clusters against brute force in float64, and what the two memberships promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dyncomp.attention.clusters import (
    attend_best,
    attend_nearest,
    best_members,
    newest_members,
)
from dyncomp.attention.kmeans import standardised

B, H, T, P, C = 2, 3, 29, 8, 4


def drawn(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = standardised(jax.random.normal(keys[0], (B, H, T, P)))
    v = jax.random.normal(keys[1], (B, H, T, P))
    scores = jax.random.normal(keys[2], (B, H, T, C))
    tables = tuple(0.3 * jax.random.normal(key, (H, 5, P)) for key in keys[3:])
    return x, v, scores, tables


def softmax_over(x, v, i, keys, distances, tables, h):
    """One query over some keys, float64."""
    x, v = np.asarray(x, np.float64), np.asarray(v, np.float64)
    far = [min(d, 4) for d in distances]
    shift = [0.0 if tables is None else np.asarray(tables[0][h, d], np.float64) for d in far]
    logits = np.asarray([x[i] @ (x[j] + s) for j, s in zip(keys, shift, strict=True)])
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    values = [
        v[j] + (0.0 if tables is None else np.asarray(tables[1][h, d], np.float64))
        for j, d in zip(keys, far, strict=True)
    ]
    return weights @ np.asarray(values)


def last_members(x, v, nearest, real, w, tables):
    """`attend_nearest` by its definition, and how many pairs it needs."""
    out, pairs = np.zeros(v.shape), np.zeros(B, int)
    for b, h, i in np.ndindex(B, H, T):
        if not real[b, i]:
            continue
        keys = [j for j in range(i + 1) if real[b, j] and nearest[b, h, j] == nearest[b, h, i]]
        keys = keys[-w:]
        pairs[b] += len(keys)
        distances = [len(keys) - 1 - n for n in range(len(keys))]
        out[b, h, i] = softmax_over(x[b, h], v[b, h], i, keys, distances, tables, h)
    return out, pairs


@pytest.mark.parametrize("w", [1, 4, 7, 15, 29, 64])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_nearest_reads_the_last_members(w, relative, padded):
    x, v, scores, tables = drawn()
    tables, nearest = tables if relative else None, jnp.argmax(scores, -1).astype(jnp.int32)
    real = np.ones((B, T), bool)
    if padded:
        real[0, 20:], real[1, :6], real[1, 11] = False, False, False
    mask = jnp.asarray(real) if padded else None
    out, needed, executed = attend_nearest(x, v, nearest, mask, w, tables)
    want, pairs = last_members(x, v, nearest, real, w, tables)
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_array_equal(needed, pairs)
    size = min(w, T)
    chunks = -(-T // size)
    assert executed == H * chunks * size * size * (1 if chunks == 1 else 2)
    assert (np.asarray(out)[~np.broadcast_to(real[:, None], out.shape[:3])] == 0).all()


@pytest.mark.parametrize("relative", [False, True])
def test_one_query_of_a_cache_is_the_last_row(relative):
    x, v, scores, tables = drawn()
    tables, nearest = tables if relative else None, jnp.argmax(scores, -1).astype(jnp.int32)
    want, *_ = attend_nearest(x, v, nearest, None, 4, tables)
    place = jnp.arange(T, dtype=jnp.int32)
    member = jnp.where(nearest == nearest[:, :, -1:], place, -1)
    out, needed, executed = newest_members(x[:, :, -1:], x, v, member, 4, tables)
    np.testing.assert_allclose(out[:, :, 0], want[:, :, -1], atol=2e-6)
    assert executed == H * 4 and (np.asarray(needed) <= executed).all()


@pytest.mark.parametrize("relative", [False, True])
def test_best_is_attention_among_members(relative):
    """Against brute force: members by a sort, rank distances, mean with eps, zeros where no cluster came."""
    x, v, scores, tables = drawn(1)
    tables, w = tables if relative else None, 6
    members, kept = best_members(scores, None, w)
    out, joined, needed, executed = attend_best(x, v, members, kept, tables=tables)
    want, count = np.zeros(v.shape), np.zeros((B, H, T), int)
    for b, h, c in np.ndindex(B, H, C):
        chosen = sorted(np.argsort(-np.asarray(scores[b, h, :, c]), kind="stable")[:w])
        np.testing.assert_array_equal(members[b, h, c], chosen)
        for rank, i in enumerate(chosen):
            keys, distances = chosen[: rank + 1], [rank - n for n in range(rank + 1)]
            want[b, h, i] += softmax_over(x[b, h], v[b, h], i, keys, distances, tables, h)
            count[b, h, i] += 1
    np.testing.assert_array_equal(joined, count)
    np.testing.assert_allclose(out, want / (count + 0.01)[..., None], atol=2e-5)
    assert (np.asarray(out)[count == 0] == 0).all() and (count == 0).any() and (count > 1).any()
    assert executed == H * C * w * w
    np.testing.assert_array_equal(needed, [H * C * w * (w + 1) // 2] * B)


@pytest.mark.parametrize("eps", [0.01, 1e-5])
def test_one_cluster_of_everything_is_dense(eps):
    x, v, scores, _ = drawn()
    members, kept = best_members(scores[..., :1], None, T)
    out, *_ = attend_best(x, v, members, kept, eps=eps)
    logits = np.einsum("bhtp,bhsp->bhts", np.float64(x), np.float64(x))
    logits = np.where(np.tri(T, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    dense = weights / weights.sum(-1, keepdims=True) @ np.float64(v)
    np.testing.assert_allclose(out, dense / (1 + eps), atol=2e-5)
    nearest = jnp.zeros((B, H, T), jnp.int32)
    np.testing.assert_allclose(attend_nearest(x, v, nearest, None, T)[0], dense, atol=2e-5)


def test_padding_takes_no_place():
    """Real tokens come out as if the padding were not there, even where a cluster has places left over."""
    x, v, scores, _ = drawn(2)
    real = jnp.arange(T)[None] < jnp.asarray([T, 5])[:, None]
    members, kept = best_members(scores, real, 8)
    out, joined, needed, _ = attend_best(x, v, members, kept)
    alone, count, *_ = attend_best(
        x[1:, :, :5], v[1:, :, :5], *best_members(scores[1:, :, :5], None, 8)
    )
    np.testing.assert_allclose(out[1, :, :5], alone[0], atol=1e-6)
    np.testing.assert_array_equal(joined[1, :, :5], count[0])
    assert not np.asarray(joined[1, :, 5:]).any() and not np.asarray(out[1, :, 5:]).any()
    assert int(needed[1]) == H * C * 15


def test_names_of_clusters_and_order_of_heads_do_not_matter():
    x, v, scores, tables = drawn(3)
    run = lambda x, v, s, t: attend_best(x, v, *best_members(s, None, 6), tables=t)[0]
    base = run(x, v, scores, tables)
    turned = jnp.asarray([2, 0, 3, 1])
    np.testing.assert_allclose(run(x, v, scores[..., turned], tables), base, atol=1e-6)
    heads = jnp.asarray([1, 2, 0])
    moved = run(x[:, heads], v[:, heads], scores[:, heads], tuple(t[heads] for t in tables))
    np.testing.assert_allclose(moved, base[:, heads], atol=1e-6)
    near = lambda s: attend_nearest(x, v, jnp.argmax(s, -1).astype(jnp.int32), None, 5)[0]
    np.testing.assert_allclose(near(scores[..., turned]), near(scores), atol=1e-6)


def test_without_order_tokens_may_be_shuffled():
    x, v, scores, _ = drawn(4)
    run = lambda x, v, s: attend_best(x, v, *best_members(s, None, 6), causal=False)[0]
    order = jax.random.permutation(jax.random.key(9), T)
    shuffled = run(x[:, :, order], v[:, :, order], scores[:, :, order])
    np.testing.assert_allclose(shuffled, run(x, v, scores)[:, :, order], atol=1e-6)


@pytest.mark.parametrize("kind", ["nearest", "best"])
def test_gradients_are_those_of_finite_differences(kind):
    x, v, scores, tables = (
        jax.tree.map(lambda a: a[:1, :, :9] if a.ndim == 4 else a, y) for y in drawn(5)
    )
    x = 0.5 * x

    @jax.jit
    def loss(x, v, tables):
        if kind == "best":
            out = attend_best(x, v, *best_members(scores, None, 4), tables=tables)[0]
        else:
            nearest = jnp.argmax(scores, -1).astype(jnp.int32)
            out = attend_nearest(x, v, nearest, None, 3, tables)[0]
        return jnp.sum(jnp.sin(out))

    check_grads(loss, (x, v, tables), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_the_largest_array_is_linear_in_the_sequence():
    """Nothing of size sequence x sequence: twice the tokens, twice the largest intermediate."""

    def largest(t, kind):
        x = jax.ShapeDtypeStruct((1, 1, t, 8), jnp.float32)
        scores = jax.ShapeDtypeStruct((1, 1, t, 4), jnp.float32)

        def run(x, scores):
            if kind == "best":
                return attend_best(x, x, *best_members(scores, None, 16))[0]
            return attend_nearest(x, x, jnp.argmax(scores, -1).astype(jnp.int32), None, 16)[0]

        jaxpr = jax.make_jaxpr(jax.grad(lambda x, s: jnp.sum(run(x, s))))(x, scores)
        return max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)

    for kind in ("nearest", "best"):
        assert largest(1024, kind) <= 2 * largest(512, kind) <= 2 * 512 * 40
