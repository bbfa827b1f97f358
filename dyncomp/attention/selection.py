"""Scores by which sparse patterns choose what to read: pooled blocks, and the attention of the newest queries.

Letters beside the legend's: ``w`` probing queries, ``x`` blocks of queries, ``y`` blocks of keys.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.typing import Array, Bool, Float, Int


def recent_attention(
    q: Float[Array, "b w h p"],
    k: Float[Array, "b s g p"],
    place: Int[Array, "#b w"] | Int[Array, "w"],
    real: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b h w s"]:
    """softmax(q k^T / sqrt(p)), causal, of a few queries over all keys: what MInference (arXiv 2407.02490) looks at.

    A query that sees no key gets zeros.

    Args:
      place: where the queries stand among the keys.
      real: False for padding.
    """
    b, w, h, p = q.shape
    g, s = k.shape[2], k.shape[1]
    split = q.reshape(b, w, g, h // g, p)
    scores = jnp.einsum("bwgrp,bsgp->bgrws", split, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(b, h, w, s) / jnp.float32(math.sqrt(p))
    place = place if place.ndim == 2 else place[None]
    seen = jnp.arange(s, dtype=jnp.int32)[None, None] <= place[:, :, None]
    seen = jnp.broadcast_to(seen, (b, w, s)) if real is None else seen & real[:, None]
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    return jnp.where(seen[:, None], jax.nn.softmax(scores, axis=-1, where=seen[:, None]), 0.0)


def vertical_scores(weights: Float[Array, "b h w s"]) -> Float[Array, "b h s"]:
    """How much all probing queries look at each key."""
    return jnp.sum(weights, axis=2)


def slash_scores(
    weights: Float[Array, "b h w s"], place: Int[Array, "#b w"] | Int[Array, "w"]
) -> Float[Array, "b h s"]:
    """How much probing queries look at the key o places before them, for o = 0, 1, ..., s - 1."""
    s = weights.shape[-1]
    key = place[..., None] - jnp.arange(s, dtype=jnp.int32)
    key = key[:, None] if place.ndim == 2 else key
    there = (key >= 0) & (key < s)
    index = jnp.broadcast_to(jnp.clip(key, 0, s - 1), weights.shape)
    return jnp.sum(jnp.where(there, jnp.take_along_axis(weights, index, axis=-1), 0.0), axis=2)


def pooled_scores(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b s g p"],
    rows: int,
    columns: int,
    real: tuple[Bool[Array, "#b t"], Bool[Array, "#b s"]] | None = None,
) -> Float[Array, "b h x y"]:
    """Products of the means of blocks of queries and keys, float32; a last block that is not full has its own mean.

    Args:
      rows, columns: queries and keys of a block.
      real: of queries and of keys, False for padding, which no mean has; a block of padding has zeros.
    """
    own, other = (None, None) if real is None else real
    means = _means(q, rows, own), _means(k, columns, other)
    h, g = q.shape[2], k.shape[2]
    keys = jnp.repeat(means[1], h // g, axis=2)
    return jnp.einsum("bxhp,byhp->bhxy", means[0], keys)


def _means(
    x: Float[Array, "b t h p"], size: int, real: Bool[Array, "#b t"] | None
) -> Float[Array, "b x h p"]:
    b, t, h, p = x.shape
    blocks = -(-t // size)
    blocked = lambda x: jnp.pad(
        x, ((0, 0), (0, blocks * size - t), *[(0, 0)] * (x.ndim - 2))
    ).reshape(x.shape[0], blocks, size, *x.shape[2:])
    there = jnp.ones((1, t), bool) if real is None else real
    full = jnp.maximum(jnp.sum(blocked(there.astype(jnp.float32)), axis=2), 1.0)
    kept = jnp.where(there[:, :, None, None], x.astype(jnp.float32), 0.0)
    return jnp.sum(blocked(kept), axis=2) / full[:, :, None, None]


def best(
    scores: Float[Array, "*n s"],
    most: int,
    budget: Int[Array, ""] | int,
    forced: int = 0,
    limit: Int[Array, "..."] | int | None = None,
) -> tuple[Int[Array, "*n m"], Int[Array, "*n"]]:
    """Places of the highest scores, ascending, and how many count.

    Args:
      most: m, entries of the result (static); at most s.
      budget: how many to take, at most m (a run-time value).
      forced: the first so many places are taken before all others.
      limit: places from here on are never taken (run-time values, of shape #*n or []).
    """
    s = scores.shape[-1]
    most = min(most, s)
    place = jnp.arange(s, dtype=jnp.int32)
    scores = jnp.where(place < forced, jnp.inf, scores.astype(jnp.float32))
    end = jnp.asarray(s if limit is None else limit, jnp.int32)
    scores = jnp.where(place < end[..., None], scores, -jnp.inf)
    _, index = lax.top_k(scores, most)
    count = jnp.minimum(jnp.minimum(jnp.asarray(budget, jnp.int32), most), end)
    count = jnp.broadcast_to(count, scores.shape[:-1])
    kept = jnp.where(jnp.arange(most, dtype=jnp.int32) < count[..., None], index, s)
    return jnp.sort(kept.astype(jnp.int32), axis=-1), count


def covering(
    mass: Float[Array, "*n s"],
    share: Float[Array, ""] | float,
    total: Float[Array, "*n"],
    slack: float = 1e-5,
) -> Int[Array, "*n"]:
    """How many of the largest masses add up to a share of a total (ZipVL, arXiv 2410.08584, eq. 6); at least 1.

    Args:
      share: tau, a run-time value; from 1 on all s count, as a sum of float32 may miss or pass the total.
      total: what all masses add up to.
      slack: how much of the total may be missing, so that rounding takes no key too many.
    """
    s = mass.shape[-1]
    share = jnp.asarray(share, jnp.float32)
    largest = -jnp.sort(-mass.astype(jnp.float32), axis=-1)
    short = jnp.cumsum(largest, axis=-1) < ((share - slack) * total)[..., None]
    count = jnp.minimum(jnp.sum(short, axis=-1, dtype=jnp.int32) + 1, s)
    return jnp.where(share >= 1.0, s, count)


def split_by(
    scores: Float[Array, "b s"], count: Int[Array, "b"], real: Bool[Array, "b s"]
) -> Int[Array, "b s"]:
    """A permutation: the ``count`` best real places, ascending, then the other real ones, ascending, then the rest.

    Of equal scores the earlier place wins.
    """
    b, s = scores.shape
    best = jnp.argsort(jnp.where(real, -scores, jnp.inf), axis=-1, stable=True)
    first = jnp.arange(s, dtype=jnp.int32)[None] < count[:, None]
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    chosen = jnp.zeros((b, s), bool).at[rows, best].set(first) & real
    return gathered_first(chosen, real & ~chosen)


def gathered_first(first: Bool[Array, "b s"], then: Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """A permutation: places of ``first``, ascending, those of ``then``, and the rest; the two are disjoint."""
    b, s = first.shape
    start, at = jnp.zeros((b, 1), jnp.int32), jnp.zeros((b, s), jnp.int32)
    for group in (first, then, ~first & ~then):
        count = jnp.cumsum(group, axis=1, dtype=jnp.int32)
        at = jnp.where(group, start + count - 1, at)
        start = start + count[:, -1:]
    place = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
    rows = jnp.arange(b, dtype=jnp.int32)[:, None]
    return jnp.zeros((b, s), jnp.int32).at[rows, at].set(place)


def best_blocks(
    scores: Float[Array, "b h x y"],
    budget: Int[Array, ""] | int,
    causal: Bool[Array, "*#b x y"],
    forced: Bool[Array, "*#b x y"] | None = None,
) -> Bool[Array, "b h x y"]:
    """Of the causal key blocks of a block of queries the ``budget`` best (a run-time value), ``forced`` ones first."""
    scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
    if forced is not None:
        scores = jnp.where(forced & causal, jnp.inf, scores)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return (rank < budget) & causal
