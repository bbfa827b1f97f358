"""TPU: the bodies of the backward kernels (Dao et al. 2022, algorithm 4).

The gradient of the queries goes through the lists, that of keys and values through the transposed lists. There rows of
a piece of scores are keys, and its columns queries, so that every product takes its factors as they lie.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from dyncomp_kernels.sparse_attention import tpu_masks
from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.scores import LOG2E, NN, NT, dot, masked
from dyncomp_kernels.sparse_attention.tpu_pieces import (
    LANES,
    blocks,
    each_piece,
    key_piece,
    key_sources,
    parts,
    row_piece,
    wide,
)
from dyncomp_kernels.sparse_attention.tpu_walk import Source, Steps, walk


def query_kernel(
    size: Layout, steps: Steps,
    offset, own, after, q, d_out, stats, keys, values, real, d_q,
    shift, delta, added, buffers, semaphores, state,
) -> None:  # fmt: skip
    """Grid [b u x], as `tpu_forward.forward_kernel`.

    Args:
      q, d_out, d_q: [n p].
      stats: [2 n], log-sum-exp in base 2 and what is subtracted from the slopes.
      shift, delta: [n 128], room for both, by row; added: [n p], room for the sum.
    """
    batch, group, block = (pl.program_id(i) for i in range(3))
    place = offset[0] + block * size.rows
    where = batch, lax.div(group, jnp.int32(size.u // size.g))
    sources = key_sources(size, where, (keys, values, real), buffers, semaphores)
    for number, ref in enumerate((shift, delta)):
        ref[...] = jnp.broadcast_to(stats[number : number + 1, :], (LANES, size.n)).T
    added[...] = jnp.zeros_like(added)

    def piece(slot: Array, begin: Any, entries: int, named: list[Array]) -> None:
        begins = [entry * size.columns for entry in named]
        step = functools.partial(
            _query_rows, size, place, begins, slot, begin, (q, d_out, shift, delta), buffers, added
        )
        free = jnp.bool_(False) if real is not None else tpu_masks.all_seen(size, place, begins)
        _either(free, lambda partial: each_piece(
            size.n, row_piece(size.r, size.rows), lambda at: step(at, partial)))  # fmt: skip

    walk(own, after, block == 0, block == size.x - 1, state, sources, steps, piece)
    d_q[...] = (added[...] * (1 / math.sqrt(size.p))).astype(d_q.dtype)


def _either(free: Array, run: Any) -> None:
    """``run`` with a mask unless ``free``."""
    pl.when(free)(lambda: run(False))
    pl.when(jnp.logical_not(free))(lambda: run(True))


def _query_rows(size, place, begins, slot, begin, own, buffers, added, at, partial) -> None:
    """Adds what a piece of a list gives to a piece of rows from ``at`` on."""
    count = row_piece(size.r, size.rows)
    q, d_out, shift, delta = (x[pl.ds(at, count), :] for x in own)
    first = pl.multiple_of(begin * size.columns, size.columns)
    queries = tpu_masks.query_places(size, place, at, count, 0)
    total = added[pl.ds(at, count), :]
    for cut in parts(len(begins), size.columns, key_piece(size.columns)):
        keys, values, *marks = (x[slot, pl.ds(first + cut[0], cut[1]), :] for x in buffers)
        scores = dot(q, keys, NT) * (LOG2E / math.sqrt(size.p))
        if partial:
            places = queries, tpu_masks.key_places(size, begins, cut)
            real = tpu_masks.real_lanes(marks[0]) if marks else None
            scores = masked(scores, size, places, real)
        weights = jnp.exp2(scores - wide(shift, cut[1]))
        slopes = weights * (dot(d_out, values, NT) - wide(delta, cut[1]))
        total = total + dot(slopes.astype(keys.dtype), keys, NN)
    added[pl.ds(at, count), :] = total


def key_kernel(
    size: Layout, steps: Steps,
    offset, own, after, keys, values, real, q, d_out, stats, d_keys, d_values,
    key_sum, value_sum, buffers, semaphores, state,
) -> None:  # fmt: skip
    """Grid [b g y e]; e goes through the groups of query heads that share a key/value head.

    Args:
      own, after: transposed lists: blocks of queries that read this block of keys.
      keys, values: [columns p]; real: [columns 128] or None; d_keys, d_values: [columns p].
      q, d_out: [b u x*n p] and stats: [b u x 2 n], in slow memory.
      key_sum, value_sum: [columns p].
      buffers: of q and d_out [2 places p], of stats [2 entries 2 n].
    """
    batch, head, block, part = (pl.program_id(i) for i in range(4))
    groups = size.u // size.g
    group = lambda part: (batch, head * groups + part)
    here, there = group(part), group(lax.rem(part + 1, groups))
    cut, put = blocks(size.n)
    number = lambda ref, i: ref.at[i]
    ways = (cut, put), (cut, put), (number, number)
    sources = [
        Source(whole.at[*here], whole.at[*there], buffer, semaphores.at[i], *way)
        for i, (whole, buffer, way) in enumerate(zip((q, d_out, stats), buffers, ways, strict=True))
    ]

    @pl.when(part == 0)
    def _():
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    def piece(slot: Array, begin: Any, entries: int, named: list[Array]) -> None:
        places = [offset[0] + entry * size.rows for entry in named]
        first_key = block * size.columns
        step = functools.partial(
            _key_rows, size, places, first_key, slot, begin, (keys, values, real), buffers, (key_sum, value_sum)
        )  # fmt: skip
        free = jnp.bool_(real is None)
        for place in places:
            free = free & tpu_masks.all_seen(size, place, [first_key])
        _either(free, lambda partial: each_piece(
            size.columns, key_piece(size.columns), lambda at: step(at, partial)))  # fmt: skip

    first = (block == 0) & (part == 0)
    last = (block == size.y - 1) & (part == groups - 1)
    walk(own, after, first, last, state, sources, steps, piece)

    @pl.when(part == groups - 1)
    def _():
        d_keys[...] = (key_sum[...] * (1 / math.sqrt(size.p))).astype(d_keys.dtype)
        d_values[...] = value_sum[...].astype(d_values.dtype)


def _key_rows(size, places, first_key, slot, begin, own, buffers, sums, at, partial) -> None:
    """Adds what a piece of a transposed list gives to a piece of keys from ``at`` on."""
    count = key_piece(size.columns)
    rows = pl.ds(at, count)
    keys, values = (x[rows, :] for x in own[:2])
    marks = None if own[2] is None else own[2][rows, :]
    key_sum, value_sum = (x[rows, :] for x in sums)
    first = pl.multiple_of(begin * size.n, size.n)
    for cut in parts(len(places), size.n, row_piece(size.r, size.rows)):
        q, d_out = (x[slot, pl.ds(first + cut[0], cut[1]), :] for x in buffers[:2])
        shift, delta = (_lanes(buffers[2], slot, begin, i, size.n, cut) for i in (0, 1))
        scores = dot(keys, q, NT) * (LOG2E / math.sqrt(size.p))
        if partial:
            real = None if marks is None else marks[:, :1] > 0
            at_keys = tpu_masks.along([first_key + at], count, 0)
            pair = _query_lanes(size, places, cut), at_keys
            scores = masked(scores, size, pair, real)
        weights = jnp.exp2(scores - shift)
        value_sum = value_sum + dot(weights.astype(q.dtype), d_out, NN)
        slopes = weights * (dot(values, d_out, NT) - delta)
        key_sum = key_sum + dot(slopes.astype(q.dtype), q, NN)
    for ref, value in zip(sums, (key_sum, value_sum), strict=True):
        ref[rows, :] = value


def _lanes(stats: Any, slot: Array, begin: Any, which: int, n: int, cut: Any) -> Array:
    """One number a query of a part, [1 w]."""
    at, width, first = cut
    own = slice(which, which + 1)
    if width < n:
        return stats[slot, begin + first, own, pl.ds(at % n, width)]
    rows = [stats[slot, begin + first + i, own, :] for i in range(width // n)]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _query_lanes(size: Layout, places: list[Array], cut: tuple[int, int, int]) -> Array:
    """Places of the queries of a part, int32 [1 w]."""
    at, width, first = cut
    if width < size.n:
        return tpu_masks.query_places(size, places[first], at, width, 1)
    entries = places[first : first + width // size.n]
    return tpu_masks.along([x for x in entries for _ in range(size.r)], size.rows, 1)
