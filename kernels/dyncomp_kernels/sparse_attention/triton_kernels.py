"""Bodies of the GPU kernels (Pallas on Triton): a program owns a tile of queries or keys, and reads a list as it goes.

Whole arrays lie in slow memory; scores are kept in base 2. Every tile is masked, as Triton has no cheap branch in a
loop that copies ahead.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.scores import LOG2E, LOW, NN, NT, dot, masked


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys of a tile, powers of two; a tile of queries lies in a block, one of keys in a block."""

    queries: int
    keys: int

    @classmethod
    def of(cls, size: Layout, queries: int, keys: int) -> "Tiles":
        """The largest up to these."""
        return cls(_power(size.n, queries), _power(size.columns, keys))


def _power(size: int, limit: int) -> int:
    """The largest power of two up to ``limit`` that divides ``size``."""
    return min(size & -size, limit)


def forward_kernel(
    size: Layout, tiles: Tiles, offset, index, count, q, k, v, real, out, lse
) -> None:
    """Grid [x * n / queries, u, b].

    Args:
      offset: int32 [1]; index: [w a x m]; count: [w a x].
      q, out: [b u x*n p]; k, v: [b g s' p]; real: bool [b s'] or None; lse: [b u x*n].
    """
    own = _Own.of(size, tiles.queries)
    rows = own.rows(tiles.queries)
    queries = q[own.batch, own.group, rows, :]
    places = own.places(size, offset[0], tiles.queries)[:, None]
    split = size.columns // tiles.keys

    def add(i: Array, state: Any) -> Any:
        top, total, mixed = state
        keys, at = _keys(index, own, i, split, size, tiles.keys)
        scores = dot(queries, k[own.batch, own.head, keys, :], NT) * (LOG2E / math.sqrt(size.p))
        marks = None if real is None else real[own.batch, keys][None]
        scores = masked(scores, size, (places, at[None]), marks)
        before, top = top, jnp.maximum(top, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - top[:, None]), jnp.exp2(before - top)
        part = dot(weights.astype(v.dtype), v[own.batch, own.head, keys, :], NN)
        return top, total * shrink + jnp.sum(weights, axis=1), mixed * shrink[:, None] + part

    low = jnp.full((tiles.queries,), LOW, jnp.float32)
    blank = low, jnp.zeros_like(low), jnp.zeros((tiles.queries, size.p), jnp.float32)
    tiled = count[own.list_batch, own.list_head, own.block] * split
    top, total, mixed = lax.fori_loop(0, tiled, add, blank)
    blind = total == 0
    some = jnp.where(blind, 1.0, total)
    out[own.batch, own.group, rows, :] = (mixed / some[:, None]).astype(out.dtype)
    lse[own.batch, own.group, rows] = jnp.where(blind, -jnp.inf, (top + jnp.log2(some)) / LOG2E)


@dataclasses.dataclass(frozen=True)
class _Own:
    """Where a program's tile of queries lies."""

    batch: Array
    group: Array
    block: Array
    head: Array
    list_batch: Array
    list_head: Array
    first: Array
    at: Array

    @classmethod
    def of(cls, size: Layout, queries: int) -> "_Own":
        tile, group, batch = (pl.program_id(i) for i in range(3))
        return cls.at_tile(size, queries, tile, group, batch)

    @classmethod
    def at_tile(cls, size: Layout, queries: int, tile: Any, group: Any, batch: Any) -> "_Own":
        first = tile * queries
        block, at = lax.div(first, jnp.int32(size.n)), lax.rem(first, jnp.int32(size.n))
        zero = jnp.int32(0)
        lists = batch if size.w > 1 else zero, group if size.a > 1 else zero
        return cls(batch, group, block, lax.div(group, jnp.int32(size.u // size.g)), *lists, first, at)  # fmt: skip

    def rows(self, queries: int) -> Any:
        return pl.ds(self.first, queries)

    def places(self, size: Layout, offset: Array, queries: int) -> Array:
        """Places of the rows, int32 [queries]."""
        row = self.at + jnp.arange(queries, dtype=jnp.int32)
        return offset + self.block * size.rows + lax.rem(row, jnp.full_like(row, size.rows))


def _keys(
    index: Any, own: _Own, i: Array, split: int, size: Layout, keys: int
) -> tuple[Any, Array]:
    """Tile i of a list: its slice of the keys, and their places."""
    entry = index[own.list_batch, own.list_head, own.block, lax.div(i, jnp.int32(split))]
    first = entry * size.columns + lax.rem(i, jnp.int32(split)) * keys
    return pl.ds(first, keys), first + jnp.arange(keys, dtype=jnp.int32)


def query_kernel(
    size: Layout, tiles: Tiles, offset, index, count, q, d_out, shift, delta, k, v, real, d_q
) -> None:
    """Grid as `forward_kernel`; shift and delta: [b u x*n], log-sum-exp in base 2 and what slopes lose."""
    own = _Own.of(size, tiles.queries)
    rows = own.rows(tiles.queries)
    queries, slope_in = (x[own.batch, own.group, rows, :] for x in (q, d_out))
    less, lost = (x[own.batch, own.group, rows][:, None] for x in (shift, delta))
    places = own.places(size, offset[0], tiles.queries)[:, None]
    split = size.columns // tiles.keys

    def add(i: Array, total: Array) -> Array:
        slab, at = _keys(index, own, i, split, size, tiles.keys)
        keys, values = (x[own.batch, own.head, slab, :] for x in (k, v))
        marks = None if real is None else real[own.batch, slab][None]
        scores = dot(queries, keys, NT) * (LOG2E / math.sqrt(size.p))
        weights = jnp.exp2(masked(scores, size, (places, at[None]), marks) - less)
        slopes = weights * (dot(slope_in, values, NT) - lost)
        return total + dot(slopes.astype(keys.dtype), keys, NN)

    blank = jnp.zeros((tiles.queries, size.p), jnp.float32)
    tiled = count[own.list_batch, own.list_head, own.block] * split
    total = lax.fori_loop(0, tiled, add, blank)
    d_q[own.batch, own.group, rows, :] = (total / math.sqrt(size.p)).astype(d_q.dtype)


def key_kernel(
    size: Layout, tiles: Tiles, offset, index, count, k, v, real, q, d_out, shift, delta, d_k, d_v
) -> None:
    """Grid [s' / keys, g, b]; index [w a y x] and count [w a y] are of the transposed lists."""
    tile, head, batch = (pl.program_id(i) for i in range(3))
    slab, zero = pl.ds(tile * tiles.keys, tiles.keys), jnp.int32(0)
    block = lax.div(tile * tiles.keys, jnp.int32(size.columns))
    keys, values = (x[batch, head, slab, :] for x in (k, v))
    at = (tile * tiles.keys + jnp.arange(tiles.keys, dtype=jnp.int32))[:, None]
    marks = None if real is None else real[batch, slab][:, None]
    split, list_batch = size.n // tiles.queries, batch if size.w > 1 else zero

    def add_from(group: Array, list_head: Array) -> Any:
        def add(i: Array, state: Any) -> Any:
            key_sum, value_sum = state
            entry = index[list_batch, list_head, block, lax.div(i, jnp.int32(split))]
            turn = entry * split + lax.rem(i, jnp.int32(split))
            own = _Own.at_tile(size, tiles.queries, turn, group, batch)
            rows = own.rows(tiles.queries)
            queries, slope_in = (x[batch, group, rows, :] for x in (q, d_out))
            less, lost = (x[batch, group, rows][None] for x in (shift, delta))
            places = own.places(size, offset[0], tiles.queries)[None]
            scores = dot(keys, queries, NT) * (LOG2E / math.sqrt(size.p))
            weights = jnp.exp2(masked(scores, size, (places, at), marks) - less)
            value_sum = value_sum + dot(weights.astype(slope_in.dtype), slope_in, NN)
            slopes = weights * (dot(values, slope_in, NT) - lost)
            return key_sum + dot(slopes.astype(queries.dtype), queries, NN), value_sum

        return add

    blank = jnp.zeros((tiles.keys, size.p), jnp.float32)
    state, groups = (blank, blank), size.u // size.g
    for part in range(groups):
        group = head * groups + part
        list_head = group if size.a > 1 else zero
        tiled = count[list_batch, list_head, block] * split
        state = lax.fori_loop(0, tiled, add_from(group, list_head), state)
    d_k[batch, head, slab, :] = (state[0] / math.sqrt(size.p)).astype(d_k.dtype)
    d_v[batch, head, slab, :] = state[1].astype(d_v.dtype)
