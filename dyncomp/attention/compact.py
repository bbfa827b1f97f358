"""Sequences without their padding, for patterns that count by slots."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.attention.asked import pick
from dyncomp.attention.selection import gathered_first
from dyncomp.attention.sight import Sight
from dyncomp.core.typing import Array, Float, Int

Attend = Callable[[Array, Array, Array, Sight], tuple[Array, Any]]


def compacted(
    attend: Attend, q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight
) -> tuple[Float[Array, "b t h p"], Any]:
    """``attend`` of every sequence as if it had no padding, wherever that lies; padding gets zeros.

    Real tokens move together, to the front; ``attend`` is told by `Sight.end` where each sequence ends. Where some
    sequences may stand further than others (a cache that holds earlier passes), it is called for one after the other.

    Args:
      attend: (q, k, v, sight) -> mixed values and numbers of which a mean over sequences is asked.
      sight: slot i holds place i, or nothing.
    """
    if q.shape[1] == k.shape[1] or q.shape[0] == 1:
        return _moved(attend, q, k, v, sight)

    def alone(row: Any) -> Any:
        q, k, v, key_place = (x[None] for x in row)
        mixed, counts = _moved(attend, q, k, v, dataclasses.replace(sight, key_place=key_place))
        return mixed[0], counts

    mixed, counts = lax.map(alone, (q, k, v, sight.key_place))
    return mixed, jax.tree.map(lambda x: jnp.mean(x, axis=0), counts)


def _moved(attend: Attend, q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Any]:
    real = sight.key_place >= 0
    own = jnp.take(real, sight.place, axis=1)
    keys, queries = (gathered_first(x, ~x) for x in (real, own))
    end = jnp.sum(real, axis=1, dtype=jnp.int32)
    place = end[0] - jnp.sum(own[0], dtype=jnp.int32) + _upto(own)
    key_place = jnp.where(_upto(real)[None] < end[:, None], _upto(real)[None], -1)
    moved = dataclasses.replace(sight, place=place, key_place=key_place, end=end)
    mixed, counts = attend(pick(q, queries), pick(k, keys), pick(v, keys), moved)
    back = pick(mixed, jnp.argsort(queries, axis=1))
    return jnp.where(own[:, :, None, None], back, jnp.zeros_like(back)), counts


def _upto(x: Array) -> Int[Array, "n"]:
    return jnp.arange(x.shape[1], dtype=jnp.int32)
