"""Spans of diagonals: coverage, no overlap, and the worked example of MInference's builder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp_kernels.sparse_attention.api import merged, sparse_attention
from dyncomp_kernels.sparse_attention.columns import column_attention
from dyncomp_kernels.sparse_attention.spans import slash_spans


def spans_of(offsets, t, size, start=0):
    offsets = jnp.asarray(sorted(offsets, reverse=True), jnp.int32)[None, None]
    count = jnp.full((1, 1), offsets.shape[-1], jnp.int32)
    return slash_spans(offsets, count, t, size, keys=start + t, start=start)


def begins(lists, x):
    return np.asarray(lists.index)[0, 0, x][: int(lists.count[0, 0, x])].tolist()


def test_the_worked_example():
    """Sheet, property 6: 512 queries, tiles of 64."""
    lists = spans_of({333, 201, 70, 1, 0}, 512, 64)
    assert lists.count[0, 0].tolist() == [1, 2, 3, 4, 4, 5, 5, 5]
    assert begins(lists, 7) == [115, 247, 378, 447, 511]
    columns = [0, 1, 2, 100, 300]
    loose = [
        sum(
            all(not b <= c < b + 64 for b in begins(lists, x)) and c < 64 * (x + 1) for c in columns
        )
        for x in range(8)
    ]
    assert loose == [0, 0, 3, 1, 3, 1, 4, 4]


@pytest.mark.parametrize("seed", range(4))
def test_every_pair_is_covered_once(seed):
    rng = np.random.default_rng(seed)
    t, size, start = int(rng.integers(20, 60)), 8, int(rng.integers(0, 20))
    chosen = {0, *rng.choice(start + t, 5, replace=False).tolist()}
    lists = spans_of(chosen, t, size, start)
    for x in range(-(-t // size)):
        tiles = begins(lists, x)
        keys = [k for begin in tiles for k in range(begin, begin + size)]
        assert len(keys) == len(set(keys))
        wanted = {
            start + i - o for i in range(x * size, min(x * size + size, t)) for o in chosen
            if start + i - o >= 0
        }  # fmt: skip
        assert wanted <= set(keys)


def test_vertical_and_slash_together_are_their_union():
    """Lines and spans merged: dense attention under the mask of both."""
    t, size, h, p = 40, 8, 2, 4
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, t, h, p)) for _ in range(3))
    offsets = jnp.asarray([[[17, 3, 0, 0], [30, 9, 8, 0]]], jnp.int32)
    counts = jnp.asarray([[3, 4]], jnp.int32)
    columns = jnp.asarray([[[0, 5, 21], [2, 33, 12]]], jnp.int32)
    lists = slash_spans(offsets, counts, t, size, keys=t)
    half = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]

    @jax.jit
    def both(q, k, v):
        spans = sparse_attention(q, k, v, lists)
        lines = column_attention(q, k, v, columns, jnp.full((1, h), 3, jnp.int32), besides=lists)
        return merged([spans, lines])[0]

    found = both(*half)
    for j in range(h):
        for i in range(t):
            tiles = np.asarray(lists.index)[0, j, i // size][: int(lists.count[0, j, i // size])]
            keys = {key for b in tiles for key in range(b, b + size)} | set(
                np.asarray(columns)[0, j]
            )
            keys = sorted(key for key in keys if 0 <= key <= i)
            scores = k[0, keys, j] @ q[0, i, j] / np.sqrt(p)
            weights = np.exp(scores - scores.max())
            want = weights / weights.sum() @ v[0, keys, j]
            np.testing.assert_allclose(found[0, i, j], want, atol=2e-6)


def test_every_offset_is_dense_attention():
    lists = spans_of(range(30), 30, 8)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 30, 1, 4)), jnp.float32) for _ in range(3))
    out, _ = sparse_attention(q, k, v, lists)
    scores = jnp.einsum("bthp,bshp->bhts", q, k) / 2
    scores = jnp.where(jnp.tril(jnp.ones((30, 30), bool)), scores, -jnp.inf)
    want = jnp.einsum("bhts,bshp->bthp", jax.nn.softmax(scores), v)
    np.testing.assert_allclose(out, want, atol=2e-6)
