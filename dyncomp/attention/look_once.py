"""Which tokens of a prompt stay: those that its last queries look at, decided once (MPCache, arXiv 2501.06807)."""

import math

import jax.numpy as jnp
from jax import lax

from dyncomp.attention.asked import pick
from dyncomp.core.typing import Array, Bool, Float, Int

ROWS = 64
"""Queries whose weights over all keys exist at once."""


def looked_at(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t g p"],
    real: Bool[Array, "b t"],
    share: float = 0.2,
    rows: int = ROWS,
) -> tuple[Float[Array, "b t"], int]:
    """Mean causal attention that each token gets from the last ``share`` of its row's real queries, over all heads.

    The mean is over the queries that can see the token: over all of them the newest tokens, which few see, would be
    dropped first. The paper's text speaks of averages; its released code leaves out 1/sqrt(p) and causality, and keeps
    a token if one query's mean over heads reaches a threshold set for each data set.

    Args:
      q, k: with positions, of one pass.
      share: in (0, 1]; at least one query of each row is asked.
      rows: queries asked at once.

    Returns:
      float32, 0 for padding, and how many query-key pairs of a head were computed for each sequence.
    """
    b, t = real.shape
    most = _ceil(share, t)
    pieces = -(-most // rows)
    count = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
    wanted = jnp.maximum(jnp.ceil(share * count - 1e-4).astype(jnp.int32), 1)
    back = jnp.arange(pieces * rows, dtype=jnp.int32)[None]
    asked = (back < wanted) & (back < count)
    order = jnp.argsort(~real, axis=1, stable=True).astype(jnp.int32)
    at = jnp.take_along_axis(order, jnp.clip(count - 1 - back, 0, t - 1), axis=1)
    split = lambda x: jnp.moveaxis(x.reshape(b, pieces, rows), 1, 0)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _weights(q, k, real, *part), None

    total, _ = lax.scan(add, jnp.zeros((b, t), jnp.float32), (split(at), split(asked)))
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    seers = jnp.minimum(count + 1 - rank, jnp.minimum(wanted, count)) * q.shape[2]
    return jnp.where(real, total / jnp.maximum(seers, 1), 0.0), pieces * rows * t


def _weights(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b t g p"],
    real: Bool[Array, "b t"],
    at: Int[Array, "b r"],
    asked: Bool[Array, "b r"],
) -> Float[Array, "b t"]:
    """Attention that queries ``at`` give each key, summed over those that are asked and over heads."""
    (b, t, h, p), g = q.shape, k.shape[2]
    own = pick(q, at).reshape(b, at.shape[1], g, h // g, p)
    scores = jnp.einsum("brgip,bsgp->bgirs", own, k, preferred_element_type=jnp.float32)
    place = jnp.arange(t, dtype=jnp.int32)[None, None]
    seen = (place <= at[:, :, None]) & real[:, None] & asked[:, :, None]
    scores = jnp.where(seen[:, None, None], scores / jnp.float32(math.sqrt(p)), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.sum(weights / jnp.where(total > 0, total, 1.0), axis=(1, 2, 3))


def most_looked_at(
    weight: Float[Array, "b s"], prompt: Bool[Array, "b s"], share: Float[Array, ""] | float
) -> Bool[Array, "b s"]:
    """The ``share`` (rounded up, a run-time value) of each row's ``prompt`` tokens with most weight, its first always.

    The first token is where models put attention that is not wanted; without it they break down.
    """
    count = jnp.sum(prompt, axis=1, dtype=jnp.int32)[:, None]
    keep = jnp.clip(jnp.ceil(share * count - 1e-4).astype(jnp.int32), 1, jnp.maximum(count, 1))
    first = prompt & (jnp.cumsum(prompt, axis=1, dtype=jnp.int32) == 1)
    wanted = jnp.where(first, jnp.inf, jnp.where(prompt, weight, -jnp.inf))
    order = jnp.argsort(-wanted, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)
    return prompt & (rank < keep)


def _ceil(share: float, count: int) -> int:
    return min(max(math.ceil(share * count - 1e-4), 1), count)
