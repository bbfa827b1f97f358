"""Vertical lines against the masked dense definition, alone and merged with blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.sparse_attention.api import merged, sparse_attention
from dyncomp_kernels.sparse_attention.columns import column_attention
from dyncomp_kernels.sparse_attention.reference import allowed_of
from dyncomp_kernels.sparse_attention.test_sparse_attention import B, drawn, random_lists

T, S, H, G, M = 19, 27, 4, 2, 9
OFFSET = S - T


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(7)
    columns = np.stack([[rng.permutation(S)[:M] for _ in range(H)] for _ in range(B)]).astype(
        np.int32
    )
    count = rng.integers(0, M + 1, (B, H)).astype(np.int32)
    count[0, 0] = 0
    return drawn(T, S, H, G), jnp.asarray(columns), jnp.asarray(count)


def seen_columns(columns, count, real=None):
    seen = np.zeros((B, H, T, S), bool)
    for n, j in np.ndindex(B, H):
        for c in np.asarray(columns)[n, j, : int(count[n, j])]:
            seen[n, j, :, c] = (real is None or bool(real[n, c])) & (c <= OFFSET + np.arange(T))
    return seen


def dense(q, k, v, seen):
    """Loops in float64; zeros and -inf where nothing is seen."""
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for n, i, j in np.ndindex(B, T, H):
        own = np.flatnonzero(seen[n, j, i])
        if len(own):
            scores = k[n, own, j // (H // G)] @ q[n, i, j] / np.sqrt(q.shape[-1])
            top = scores.max()
            weights = np.exp(scores - top)
            out[n, i, j] = weights / weights.sum() @ v[n, own, j // (H // G)]
            lse[n, i, j] = top + np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("padded", [False, True])
def test_columns_alone(problem, padded):
    qkv, columns, count = problem
    real = np.random.default_rng(3).random((B, S)) < 0.6 if padded else None
    half = [jnp.asarray(x, jnp.float32) for x in qkv]
    given = None if real is None else jnp.asarray(real)
    found = column_attention(*half, columns, count, offset=OFFSET, real=given)
    for own, want in zip(found, dense(*qkv, seen_columns(columns, count, real)), strict=True):
        np.testing.assert_allclose(own, want, atol=2e-6)


@pytest.mark.parametrize("a", [1, G, H])
def test_columns_and_blocks_count_no_pair_twice(problem, a):
    qkv, columns, count = problem
    lists = random_lists(T, S, a, 5, 4)
    half = [jnp.asarray(x, jnp.float32) for x in qkv]
    blocks = sparse_attention(*half, lists, offset=OFFSET)
    lines = column_attention(*half, columns, count, besides=lists, offset=OFFSET)
    both = np.asarray(allowed_of(lists, B, T, S, H, causal=True, offset=OFFSET))
    both = both | seen_columns(columns, count)
    for own, want in zip(merged([blocks, lines]), dense(*qkv, both), strict=True):
        np.testing.assert_allclose(own, want, atol=2e-6)


def test_gradients_by_finite_differences(problem):
    qkv, columns, count = problem
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in qkv]
        turn = jnp.asarray(np.random.default_rng(0).normal(size=qkv[0].shape))

        def loss(q, k, v):
            out, lse = column_attention(q, k, v, columns, count, offset=OFFSET)
            return jnp.sum(out * turn) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0))

        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*wide)

        def truth(q, k, v):
            out, lse = dense(q, k, v, seen_columns(columns, count))
            return np.sum(out * np.asarray(turn)) + np.sum(np.where(np.isfinite(lse), lse, 0))

        step = 1e-5
        for place in range(3):
            direction = np.random.default_rng(place).normal(size=qkv[place].shape)
            moved = lambda sign, p=place, d=direction: [
                x + sign * step * d if i == p else x for i, x in enumerate(qkv)
            ]
            slope = (truth(*moved(1)) - truth(*moved(-1))) / (2 * step)
            assert float(np.sum(found[place] * direction)) == pytest.approx(
                slope, rel=1e-3, abs=1e-4
            )


def test_bad_shapes_are_refused(problem):
    qkv, columns, count = problem
    half = [jnp.asarray(x, jnp.float32) for x in qkv]
    with pytest.raises(ValueError, match="columns"):
        column_attention(*half, columns[:, :1], count)
