"""Scaled dot-product attention: the plain form, and the same over blocks of keys for long or partly filled caches."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.attention.sight import Sight
from dyncomp.core.dtypes import widened
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels._widths import sum_dtype
from dyncomp_kernels.sparse_attention.running import LOWEST, Running

ROWS, KEYS = 256, 512
"""Queries and slots of a block: its scores for nine heads stay within a core's cache."""

MOST = 0.5
"""Share of a cache's slots from which a single query takes all of them in one product, on CPUs."""

APART = 8
"""Query heads of a key/value head up to which each has products of its own."""

SMALL = 128
"""Slots up to which one dense product is taken: there loops cost more to compile than they save."""


def attend(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b s g p"],
    v: Float[Array, "b s g p"],
    allowed: Bool[Array, "#b t s"] | None,
) -> Float[Array, "b t h p"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1) with shared key/value heads (Ainslie et al. 2023).

    Head j reads key/value head ``j // (h / g)``. Scores and softmax are float32 or more. A query that may see nothing
    gets the mean of all values: finite, and never looked at.
    """
    weights = jax.nn.softmax(scores_of(q, k, allowed), axis=-1)
    return weighted(weights, v).reshape(q.shape).astype(q.dtype)


def scores_of(
    q: Float[Array, "b t h p"], k: Float[Array, "b s g p"], allowed: Bool[Array, "#b t s"] | None
) -> Float[Array, "b g r t s"]:
    """Scaled scores, float32 or more, the lowest number where nothing is allowed; r: query heads of a k/v head."""
    b, t, h, p = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, p)
    wide = sum_dtype(q.dtype)
    scores = jnp.einsum("btgrp,bsgp->bgrts", q, k, preferred_element_type=wide)
    scores = scores * wide.type(1.0 / math.sqrt(p))
    return scores if allowed is None else jnp.where(allowed[:, None, None], scores, LOWEST)


def weighted(
    weights: Float[Array, "b g r t s"], v: Float[Array, "b s g p"]
) -> Float[Array, "b t g r p"]:
    """Values summed by weights, which are rounded to the values' dtype first; float32 or more."""
    weights, wide = weights.astype(v.dtype), sum_dtype(v.dtype)
    return jnp.einsum("bgrts,bsgp->btgrp", weights, v, preferred_element_type=wide)


@jax.custom_vjp
def attend_seen(
    q: Float[Array, "b t h p"], k: Float[Array, "b s g p"], v: Float[Array, "b s g p"], sight: Sight
) -> tuple[Float[Array, "b t h p"], Int[Array, ""]]:
    """`attend` that reads only blocks of slots which some query of a block sees; no table of all scores exists.

    Gradients are those of `attend` and cost its memory. Small caches take one dense product, and so do single queries
    on accelerators, where that is one kernel.

    Returns:
      The mixed values (of a query that may see nothing: finite), and how many pairs of each sequence were computed.
    """
    # XLA's CPU compiler has no fast product of bfloat16 matrices, and for some layouts none.
    small = k.shape[1] <= SMALL
    blocks = lambda dtype: functools.partial(_blocks, dtype=dtype)
    default = _dense if small or q.shape[1] == 1 else blocks(q.dtype.name)
    cpu = _dense_float32 if small else blocks("float32")
    return lax.platform_dependent(q, k, v, sight, cpu=cpu, default=default)


def _dense(q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Array]:
    return attend(q, k, v, sight.all()), jnp.int32(q.shape[1] * k.shape[1])


def _dense_float32(q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Array]:
    mixed, pairs = _dense(widened(q), widened(k), widened(v), sight)
    return mixed.astype(q.dtype), pairs


def _forward(q: Array, k: Array, v: Array, sight: Sight):
    return attend_seen(q, k, v, sight), (q, k, v, sight)


def _backward(saved, cotangents):
    q, k, v, sight = saved
    _, pull = jax.vjp(lambda q, k, v: attend(q, k, v, sight.all()), q, k, v)
    return *pull(cotangents[0]), None


attend_seen.defvjp(_forward, _backward)


def _blocks(q: Array, k: Array, v: Array, sight: Sight, dtype: str) -> tuple[Array, Array]:
    """All blocks of queries, one after another; ``dtype`` is what products multiply."""
    b, t, h, p = q.shape
    g, rows = k.shape[2], min(t, ROWS)
    count = -(-t // rows)
    scaled = (q.astype(jnp.float32) / math.sqrt(p)).astype(dtype)
    # As the products read them, once for all blocks; a `FullCache` already holds them so.
    keys, values = jnp.transpose(k, (0, 2, 3, 1)), jnp.swapaxes(v, 1, 2)
    # A last block that is not full starts earlier and repeats queries.
    starts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * rows, t - rows)

    def run(start: Array) -> tuple[Array, Array]:
        own = lax.dynamic_slice_in_dim(scaled, start, rows, axis=1)
        own = own.reshape(b, rows, g, h // g, p).transpose(0, 2, 3, 1, 4)
        own = own.reshape(b, g, -1, p)
        if t == 1 and k.dtype == jnp.float32:
            return _one_query(own, keys, values, sight)
        return _one_block(own, keys, values, sight, start, rows)

    if count == 1:
        mixed, pairs = run(jnp.int32(0))
        return _rows_first(mixed, h, rows).astype(q.dtype), pairs
    mixed, pairs = lax.map(run, starts)
    parts = _rows_first(mixed, h, rows).astype(q.dtype)  # [x b rows h p]
    joined = jnp.concatenate(
        [
            jnp.moveaxis(parts[:-1], 0, 1).reshape(b, -1, h, p),
            parts[-1, :, (count * rows - t) :],
        ],
        axis=1,
    )
    return joined, jnp.sum(pairs, dtype=jnp.int32)


def _rows_first(mixed: Float[Array, "*x b g n p"], h: int, rows: int) -> Float[Array, "*x b r h p"]:
    p = mixed.shape[-1]
    split = mixed.reshape(*mixed.shape[:-2], -1, rows, p)  # [... g h/g rows p]
    return jnp.moveaxis(split, -2, -4).reshape(*mixed.shape[:-3], rows, h, p)


def _one_query(
    q: Float[Array, "b g n p"],
    k: Float[Array, "b g p s"],
    v: Float[Array, "b g s p"],
    sight: Sight,
) -> tuple[Float[Array, "b g n p"], Int[Array, ""]]:
    """`_one_block` for one query a sequence, over all slots at once where it sees `MOST` of them.

    Products outside a loop are the faster ones there, and those of one vector the fastest.
    """
    slots = v.shape[2]
    first, past = sight.reach(0, 1, min(slots, KEYS))

    def all_slots(k: Array, v: Array) -> tuple[Array, Array]:
        scores = _each_row(q, k)
        weights = jax.nn.softmax(jnp.where(sight.all()[:, None], scores, LOWEST), axis=-1)
        return _each_row(weights, v), jnp.int32(slots)

    blocks = lambda k, v: _one_block(q, k, v, sight, jnp.int32(0), 1)
    return lax.cond((past - first) * KEYS >= MOST * slots, all_slots, blocks, k, v)


def _each_row(
    rows: Float[Array, "b g n k"], matrix: Float[Array, "b g k m"]
) -> Float[Array, "b g n m"]:
    """Rows times matrices, float32; up to `APART` rows each by itself, as XLA's CPU compiler wants it."""
    whole = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if rows.shape[2] > APART:
        return whole("bgnk,bgkm->bgnm", rows, matrix)
    return jnp.stack(
        [whole("bgk,bgkm->bgm", row, matrix) for row in jnp.moveaxis(rows, 2, 0)], axis=2
    )


def _one_block(
    q: Float[Array, "b g n p"],
    k: Float[Array, "b g p s"],
    v: Float[Array, "b g s p"],
    sight: Sight,
    row: Array,
    rows: int,
) -> tuple[Float[Array, "b g n p"], Int[Array, ""]]:
    """Mixed values, float32, of one block of queries (n: heads of a group by rows), and its pairs."""
    slots = v.shape[2]
    columns = min(slots, KEYS)
    first, past = sight.reach(row, rows, columns)

    def fold(index: Array, state: Running) -> Running:
        begin = index * columns
        start = jnp.minimum(begin, slots - columns)  # a last block that is not full starts earlier
        keys, values = (
            lax.dynamic_slice_in_dim(x, start, columns, axis).astype(q.dtype)
            for x, axis in ((k, 3), (v, 2))
        )
        fresh = start + jnp.arange(columns, dtype=jnp.int32) >= begin
        seen = sight.block(row, rows, start, columns) & fresh[None, None]
        return _add(state, q, keys, values, seen)

    _, total, mixed = lax.fori_loop(first, past, fold, Running.blank(q.shape))
    return mixed / total[..., None], (past - first) * (rows * columns)


def _add(
    state: Running,
    q: Float[Array, "b g n p"],
    keys: Float[Array, "b g p c"],
    values: Float[Array, "b g c p"],
    seen: Bool[Array, "#b r c"],
) -> Running:
    """With some slots' keys and values."""
    scores = jnp.einsum("bgnp,bgps->bgns", q, keys, preferred_element_type=jnp.float32)
    split = scores.reshape(*scores.shape[:2], -1, *seen.shape[1:])
    scores = jnp.where(seen[:, None, None], split, LOWEST).reshape(scores.shape)
    mix = functools.partial(jnp.einsum, "bgns,bgsp->bgnp", preferred_element_type=jnp.float32)
    return state.add(scores, lambda weights: mix(weights.astype(q.dtype), values))
