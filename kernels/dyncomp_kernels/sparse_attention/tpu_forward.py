"""TPU: the body of the forward kernel, a block of queries of one group against the keys of its list.

Scores are kept in base 2. Sums are kept by lane and added up over the lanes at the end only. The product for one part
is asked for before the softmax of the part before it, so that the compiler fills the matrix units meanwhile.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from dyncomp_kernels.sparse_attention import tpu_masks
from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.scores import LOG2E, LOW, NN, NT, dot, masked
from dyncomp_kernels.sparse_attention.tpu_pieces import (
    LANES,
    each_piece,
    key_piece,
    key_sources,
    parts,
    row_piece,
    wide,
)
from dyncomp_kernels.sparse_attention.tpu_walk import Steps, walk


def forward_kernel(
    size: Layout, steps: Steps,
    offset, own, after, q, keys, values, real, out, lse,
    top, total, mixed, buffers, semaphores, state,
) -> None:  # fmt: skip
    """Grid [b u x].

    Args:
      offset: int32 [1], scalar memory; own, after: [1 1+m] there, this list and the next.
      q: [n p]; keys, values: [b g s' p] and real: [b s' 128], in slow memory.
      out: [n p]; lse: [1 n].
      top, total: [n 128]; mixed: [n p]; buffers: of keys, values and marks, [2 places p].
    """
    batch, group, block = (pl.program_id(i) for i in range(3))
    place = offset[0] + block * size.rows
    where = batch, lax.div(group, jnp.int32(size.u // size.g))
    sources = key_sources(size, where, (keys, values, real), buffers, semaphores)
    top[...] = jnp.full_like(top, LOW)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)

    def piece(slot: Array, begin: Any, entries: int, named: list[Array]) -> None:
        begins = [entry * size.columns for entry in named]
        step = functools.partial(
            _rows, size, place, begins, slot, begin, q, buffers, (top, total, mixed)
        )
        run = lambda partial: each_piece(
            size.n, row_piece(size.r, size.rows), lambda at: step(at, partial)
        )
        if real is not None:
            run(True)
            return
        free = tpu_masks.all_seen(size, place, begins)
        pl.when(free)(lambda: run(False))
        pl.when(jnp.logical_not(free))(lambda: run(True))

    walk(own, after, block == 0, block == size.x - 1, state, sources, steps, piece)
    _finish(out, lse, top, total, mixed)


def _rows(size, place, begins, slot, begin, q, buffers, scratch, at, partial) -> None:
    """Adds a piece of a list to a piece of rows from ``at`` on."""
    count = row_piece(size.r, size.rows)
    rows, scale = pl.ds(at, count), LOG2E / math.sqrt(size.p)
    cuts = parts(len(begins), size.columns, key_piece(size.columns))
    span = lambda cut: pl.ds(pl.multiple_of(begin * size.columns, size.columns) + cut[0], cut[1])
    read = lambda buffer, cut: buffer[slot, span(cut), :]
    score = lambda cut: dot(q[rows, :], read(buffers[0], cut), NT) * scale
    top, total, mixed = (x[rows, :] for x in scratch)
    queries = tpu_masks.query_places(size, place, at, count, 0)
    ahead = score(cuts[0])
    for cut, following in zip(cuts, [*cuts[1:], None], strict=True):
        scores, ahead = ahead, score(following) if following else ahead
        if partial:
            real = tpu_masks.real_lanes(read(buffers[2], cut)) if len(buffers) > 2 else None
            places = queries, tpu_masks.key_places(size, begins, cut)
            scores = masked(scores, size, places, real)
        before, top = top, jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(scores - wide(top, cut[1])), jnp.exp2(before - top)
        total = total * shrink + _by_lane(weights)
        part = dot(weights.astype(buffers[1].dtype), read(buffers[1], cut), NN)
        mixed = mixed * wide(shrink, size.p) + part
    for ref, value in zip(scratch, (top, total, mixed), strict=True):
        ref[rows, :] = value


def _by_lane(weights: Array) -> Array:
    """Sums [n 128] whose lanes add up to the sum over [n width]."""
    width = weights.shape[1]
    if width % LANES == 0:
        cuts = [weights[:, i : i + LANES] for i in range(0, width, LANES)]
        return functools.reduce(jnp.add, cuts)
    lane = lax.broadcasted_iota(jnp.int32, (weights.shape[0], LANES), 1)
    return jnp.where(lane == 0, jnp.sum(weights, axis=1, keepdims=True), 0.0)


def _finish(out, lse, top, total, mixed) -> None:
    """Divides by the sums; zeros and -inf where nothing was seen."""
    n, p = mixed.shape
    summed = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), (n, LANES))
    blind = summed == 0
    some = jnp.where(blind, 1.0, summed)
    out[...] = (mixed[...] * wide(1 / some, p)).astype(out.dtype)
    found = jnp.where(blind, -jnp.inf, (top[...] + jnp.log2(some)) / LOG2E)
    lse[...] = found.T[:1]
