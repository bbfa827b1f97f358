"""Boxes around consecutive keys of a cache, and scores of a query against them.

A cluster of ``size`` consecutive slots is summed up by the largest and the least value of each coordinate of its keys.
Letters beside the legend's: ``n`` clusters.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.attention.asked import pick, put
from dyncomp.core.typing import Array, Bool, Float, Int

Score = Literal["linear", "bound", "mean", "best", "random"]
"""How clusters are scored: see `scores_of`."""


@struct.dataclass
class Boxes:
    """Clusters of each key/value head; empty ones hold zeros.

    Attributes:
      high, low: [b n g p], greatest and least coordinates of the keys.
      centre: [b n g p], one vector for each cluster whose product with a query is its score.
    """

    high: Float[Array, "*l b n g p"]
    low: Float[Array, "*l b n g p"]
    centre: Float[Array, "*l b n g p"]


def blank(batch: int, clusters: int, kv_heads: int, head_dim: int, dtype: str) -> Boxes:
    """No key yet."""
    zeros = lambda: jnp.zeros((batch, clusters, kv_heads, head_dim), dtype)
    return Boxes(zeros(), zeros(), zeros())


def boxes_of(
    keys: Float[Array, "b s g p"],
    count: Int[Array, "b"],
    size: int,
    alpha: Float[Array, ""] | float | None,
) -> Boxes:
    """Clusters of the first ``count`` slots of each row; a last one that is not full has its own keys only.

    Args:
      alpha: centres are ``alpha high + (1 - alpha) low`` (MPCache: 0.6); None for the mean key.
    """
    b, s, g, p = keys.shape
    n = -(-s // size)
    padded = jnp.pad(keys, ((0, 0), (0, n * size - s), (0, 0), (0, 0)))
    split = padded.reshape(b, n, size, g, p)
    slot = jnp.arange(n * size, dtype=jnp.int32).reshape(1, n, size)
    held = (slot < count[:, None, None])[..., None, None]
    some = jnp.any(held, axis=2)
    high = jnp.where(some, jnp.max(jnp.where(held, split, -jnp.inf), axis=2), 0.0)
    low = jnp.where(some, jnp.min(jnp.where(held, split, jnp.inf), axis=2), 0.0)
    high, low = high.astype(keys.dtype), low.astype(keys.dtype)
    if alpha is not None:
        return Boxes(high, low, mixed(high, low, alpha))
    total = jnp.sum(jnp.where(held, split, 0.0).astype(jnp.float32), axis=2)
    members = jnp.maximum(jnp.sum(held, axis=2), 1).astype(jnp.float32)
    return Boxes(high, low, (total / members).astype(keys.dtype))


def mixed(high: Array, low: Array, alpha: Float[Array, ""] | float) -> Array:
    """``alpha high + (1 - alpha) low``, in float32 and back."""
    wide = jnp.float32
    return (alpha * high.astype(wide) + (1 - alpha) * low.astype(wide)).astype(high.dtype)


def grown(
    boxes: Boxes,
    key: Float[Array, "b g p"],
    at: Int[Array, "b"],
    size: int,
    alpha: Float[Array, ""] | float | None,
    real: Bool[Array, "b"],
) -> Boxes:
    """With the key that now lies in slot ``at`` of each row that is ``real``; only its cluster changes."""
    cluster, members = at // size, (at % size)[:, None, None]
    here = lambda x: pick(x, cluster[:, None])[:, 0]
    key = key.astype(boxes.high.dtype)
    first = members == 0
    high = jnp.where(first, key, jnp.maximum(here(boxes.high), key))
    low = jnp.where(first, key, jnp.minimum(here(boxes.low), key))
    if alpha is None:
        before = jnp.where(first, 0.0, here(boxes.centre).astype(jnp.float32))
        centre = before + (key.astype(jnp.float32) - before) / (members + 1).astype(jnp.float32)
    else:
        centre = mixed(high, low, alpha)
    own = real[:, None, None]
    write = lambda x, new: put(x, cluster, jnp.where(own, new.astype(x.dtype), here(x)))
    return Boxes(write(boxes.high, high), write(boxes.low, low), write(boxes.centre, centre))


def scores_of(
    q: Float[Array, "b h p"],
    boxes: Boxes,
    kind: Score,
    held: tuple[Float[Array, "b s g p"], Int[Array, "b"], int] | None = None,
) -> Float[Array, "b g n"]:
    """Scores of clusters for each key/value head: the sum of those of its query heads, float32.

    "linear" and "mean" are products with the centres, so the heads' queries are added first and multiplied once.
    "bound" is the largest product that a key in the box could have (Quest, arXiv 2406.10774), "best" the largest that
    a key has (an oracle that reads every key), "random" a control, drawn from the bits of the query.

    Args:
      held: keys, how many slots of each row hold one, and the clusters' size; only for "best".
    """
    (b, h, p), (_, n, g, _) = q.shape, boxes.high.shape
    split = q.astype(jnp.float32).reshape(b, g, h // g, p)
    product = lambda q, x: jnp.einsum("bgp,bngp->bgn", q, x.astype(jnp.float32))
    if kind == "best":
        assert held is not None
        return _best(split, *held)
    if kind == "random":
        bits = jax.lax.bitcast_convert_type(split[0, 0, 0, 0], jnp.uint32)
        return jax.random.uniform(jax.random.fold_in(jax.random.key(n), bits), (b, g, n))
    if kind == "bound":
        up, down = jnp.sum(jnp.maximum(split, 0), axis=2), jnp.sum(jnp.minimum(split, 0), axis=2)
        return product(up, boxes.high) + product(down, boxes.low)
    return product(jnp.sum(split, axis=2), boxes.centre)


def _best(
    q: Float[Array, "b g r p"], keys: Float[Array, "b s g p"], count: Int[Array, "b"], size: int
) -> Float[Array, "b g n"]:
    s = keys.shape[1]
    n = -(-s // size)
    scores = jnp.einsum("bgrp,bsgp->bgrs", q, keys.astype(jnp.float32))
    held = jnp.arange(s, dtype=jnp.int32)[None] < count[:, None]
    scores = jnp.where(held[:, None, None], scores, -jnp.inf)
    room = ((0, 0), (0, 0), (0, 0), (0, n * size - s))
    scores = jnp.pad(scores, room, constant_values=-jnp.inf)
    return jnp.sum(jnp.max(scores.reshape(*scores.shape[:3], n, size), axis=-1), axis=2)


def children(boxes: Boxes, index: Int[Array, "b g c"]) -> Any:
    """Listed clusters of each key/value head, as `Boxes` [b c g p]."""
    at = jnp.swapaxes(index, 1, 2)[..., None]
    take = lambda x: jnp.take_along_axis(x, at, axis=1, mode="clip")
    return Boxes(take(boxes.high), take(boxes.low), take(boxes.centre))
