"""Attention over single listed keys, the same for all queries of a head: the vertical lines of a pattern."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of
from dyncomp_kernels.sparse_attention.running import LOWEST

ROWS = 128
"""Queries of a block where no lists say it."""


def column_attention(
    q: Array,
    k: Array,
    v: Array,
    columns: Array,
    count: Array,
    *,
    besides: BlockLists | None = None,
    causal: bool = True,
    offset: Array | int = 0,
    real: Array | None = None,
) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(p)) v over some keys of each head, and its log-sum-exp, as `sparse_attention` gives them.

    Args:
      q: [b t h p]; k, v: [b s g p].
      columns: int32 [b h m], places of keys, no two alike in the first ``count``; the rest is anything in range.
      count: int32 [b h].
      besides: leaves out keys in blocks that these lists name, so that both results merge and count no pair twice.
      causal, offset, real: as `sparse_attention`.

    Returns:
      [b t h p] in the dtype of q, and float32 [b t h]; zeros and -inf where nothing is seen. Differentiable.

    Raises:
      ValueError: shapes do not fit.
    """
    (b, t, h, p), g = q.shape, k.shape[2]
    if columns.shape[:2] != (b, h) or count.shape != (b, h):
        raise ValueError(
            f"column_attention: columns {list(columns.shape)} and count {list(count.shape)}; give [{b}, {h}, m] and"
            f" [{b}, {h}]"
        )
    rows = ROWS if besides is None else besides.rows
    blocks = blocks_of(t, rows)
    head = jnp.arange(h, dtype=jnp.int32) // (h // g)
    at = lambda x: jax.vmap(lambda x, c: x[c, head[:, None]])(x, columns).astype(jnp.float32)
    keys, values = at(k), at(v)  # [b h m p]
    listed = jnp.arange(columns.shape[-1], dtype=jnp.int32) < count[..., None]
    if real is not None:
        listed = listed & jax.vmap(lambda real, columns: real[columns])(real, columns)
    free = _free(besides, columns, blocks, h)
    scaled = jnp.pad(q.astype(jnp.float32) / math.sqrt(p), _after(blocks * rows - t))
    scaled = scaled.reshape(b, blocks, rows, h, p).transpose(1, 0, 3, 2, 4)
    place = jnp.asarray(offset, jnp.int32) + jnp.arange(blocks * rows, dtype=jnp.int32)

    @jax.checkpoint
    def run(given: tuple[Array, ...]) -> tuple[Array, Array]:
        own, place, free = given
        seen = jnp.broadcast_to((listed & free)[:, :, None], (b, h, rows, columns.shape[-1]))
        if causal:
            seen = seen & (columns[:, :, None] <= place[:, None])
        scores = jnp.where(seen, jnp.einsum("bhrp,bhmp->bhrm", own, keys), LOWEST)
        top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
        total = jnp.sum(weights, axis=-1)
        some = jnp.where(total > 0, total, 1.0)
        mixed = jnp.einsum("bhrm,bhmp->bhrp", weights, values) / some[..., None]
        return mixed, jnp.where(total > 0, top[..., 0] + jnp.log(some), -jnp.inf)

    mixed, lse = lax.map(run, (scaled, place.reshape(blocks, rows), free))
    mixed = mixed.transpose(1, 0, 3, 2, 4).reshape(b, blocks * rows, h, p)[:, :t]
    lse = lse.transpose(1, 0, 3, 2).reshape(b, blocks * rows, h)[:, :t]
    return mixed.astype(q.dtype), lse


def _free(besides: BlockLists | None, columns: Array, blocks: int, heads: int) -> Array:
    """Which columns lie in no listed block of each block of queries: bool [x b h m]."""
    if besides is None:
        return jnp.ones((blocks, *columns.shape), bool)
    wide = lambda x: jnp.moveaxis(_of_heads(x, columns.shape[0], heads), 2, 0)
    index, count = wide(besides.index), wide(besides.count)  # [x b h m'], [x b h]
    unit = besides.columns if besides.unit is None else besides.unit

    def drop(at: Array, free: Array) -> Array:
        begin = lax.dynamic_index_in_dim(index, at, axis=3) * unit
        inside = (columns >= begin) & (columns < begin + besides.columns)
        return free & ~(inside & (at < count)[..., None])

    every = vary_like(jnp.ones((blocks, *columns.shape), bool), columns, index, count)
    return lax.fori_loop(0, jnp.max(count), drop, every)


def _of_heads(x: Array, batch: int, heads: int) -> Array:
    """Lists [b a ..] for every sequence and head."""
    x = jnp.repeat(x, heads // x.shape[1], axis=1)
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def _after(rows: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, rows), (0, 0), (0, 0)]


def tiles_of(lists: BlockLists, columns: Array, count: Array, offset: Array | int = 0) -> Array:
    """Tiles that spans and loose columns are: listed blocks, and loose columns a tile's width at a time.

    MInference's kernel (arXiv 2407.02490) loops over these. A column is loose for a block of queries where no listed
    block holds it and it is not behind the last query.

    Args:
      lists, columns, count, offset: as for `column_attention`; lists of each head [b h x m].

    Returns:
      int32 [b h x].
    """
    heads, blocks = lists.count.shape[1], lists.count.shape[2]
    free = jnp.moveaxis(_free(lists, columns, blocks, heads), 0, 2)  # [b h x m]
    listed = jnp.arange(columns.shape[-1], dtype=jnp.int32) < count[..., None]
    ends = jnp.asarray(offset, jnp.int32) + (jnp.arange(blocks, dtype=jnp.int32) + 1) * lists.rows
    before = columns[:, :, None] < ends[:, None]
    loose = jnp.sum(free & before & listed[:, :, None], axis=-1, dtype=jnp.int32)
    return lists.count + (loose + lists.columns - 1) // lists.columns
