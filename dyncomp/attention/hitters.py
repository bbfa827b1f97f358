"""A cache that keeps, for each head, what was looked at most (H2O, Zhang et al. 2023, arXiv 2306.14048)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.attention.asked import Asked, Work, dense_pairs
from dyncomp.attention.cache import CacheState
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int

ROWS = 64
"""Queries whose weights over all keys exist at once."""


@struct.dataclass
class Watched(CacheState):
    """A cache whose heads keep different tokens, and how much each was looked at.

    Attributes:
      keys, values: [b s g p], keys with their positions.
      places: int32 [b s g], of the token in the slot; -1 where empty.
      scores: float32 [b s g], attention received.
      length: int32 [].
      policy: static.
    """

    keys: Float[Array, "*l b s g p"]
    values: Float[Array, "*l b s g p"]
    places: Int[Array, "*l b s g"]
    scores: Float[Array, "*l b s g"]
    length: Int[Array, "*l"]
    policy: Any = struct.field(pytree_node=False)

    def seen(self) -> Int[Array, "b"]:
        """Slots in use, of the first head; all have as many."""
        return jnp.sum(self.places[..., 0] >= 0, axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class HeavyHitters:
    """The ``recent`` newest tokens and, of the others, those that received most attention, for each key/value head.

    A pass of several positions sees all that was kept and itself, adds up what each key receives, and is then cut to
    the budget; a single position first displaces the least wanted. Attention of a group's query heads is added up.

    Attributes:
      max_length: accepted, as all policies are called with it; the cache has ``budget`` slots at most.
      budget: tokens kept, ``recent`` among them.
      recent: newest tokens that are always kept, at least 1.
    """

    max_length: int
    budget: int = 512
    recent: int = 256

    def __post_init__(self):
        if self.max_length < 1 or not 1 <= self.recent < self.budget:
            raise DyncompError(
                f"HeavyHitters: max_length={self.max_length}, budget={self.budget}, recent={self.recent}; use"
                " 1 <= recent < budget"
            )

    forgets = True

    @property
    def slots(self) -> int:
        """Of the cache."""
        return min(self.max_length, self.budget)

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> Watched:
        """Empty."""
        shape = (batch, self.slots, kv_heads)
        zeros = lambda: jnp.zeros((*shape, head_dim), dtype)
        places, scores = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)
        return Watched(zeros(), zeros(), places, scores, jnp.int32(0), self)

    def truncate(self, cache: Watched, length: Int[Array, ""] | Int[Array, "b"]) -> Watched:
        """Places from ``length`` on are forgotten; what they displaced does not come back."""
        gone = cache.places >= jnp.reshape(length, (-1, 1, 1))
        places = jnp.where(gone, -1, cache.places)
        return dataclasses.replace(cache, places=places, length=jnp.max(length))

    def attend(self, cache: Watched, asked: Asked) -> tuple[Watched, Float[Array, "b t h p"], Work]:
        """What was kept, and the pass itself."""
        asked.check_plain(self)
        needed = dense_pairs(asked, cache.seen(), None if asked.q.shape[1] > 1 else self.slots)
        (q, k), t = asked.turned(), asked.q.shape[1]
        new = dataclasses.replace(
            cache,
            keys=k.astype(cache.keys.dtype),
            values=asked.v.astype(cache.values.dtype),
            places=jnp.broadcast_to(asked.own_place()[..., None], k.shape[:3]),
            scores=jnp.zeros(k.shape[:3], jnp.float32),
        )
        shown = self._displaced(cache, new) if t == 1 else _joined(cache, new)
        mixed, mass = watched_attention(q, shown, asked.place, asked.mask)
        after = dataclasses.replace(shown, scores=shown.scores + mass, length=cache.length + t)
        after = after if t == 1 else self._cut(after)
        return after, mixed, Work(jnp.int32(t * shown.keys.shape[1]), needed)

    def _wanted(self, cache: Watched) -> Float[Array, "b s g"]:
        """How much each slot is wanted: the newest before all, empty ones last."""
        newest = jnp.sort(jnp.where(cache.places < 0, -1, cache.places), axis=1)[:, -self.recent :]
        recent = cache.places >= jnp.maximum(newest[:, :1], 0)
        wanted = jnp.where(recent, jnp.inf, cache.scores)
        return jnp.where(cache.places < 0, -jnp.inf, wanted)

    def _displaced(self, cache: Watched, new: Watched) -> Watched:
        """The new token in place of the least wanted one of each head; padding displaces none."""
        at = jnp.argmin(self._wanted(cache), axis=1)[:, None].astype(jnp.int32)  # [b 1 g]

        def written(x: Array, y: Array) -> Array:
            index = at.reshape(*at.shape, *[1] * (x.ndim - 3))
            own = jnp.take_along_axis(x, index, axis=1)
            y = jnp.where((new.places >= 0).reshape(index.shape), y, own)
            place = jnp.broadcast_to(index, y.shape)
            return jnp.put_along_axis(x, place, y, axis=1, inplace=False)

        return _map(written, cache, new)

    def _cut(self, cache: Watched) -> Watched:
        """The most wanted of each head, in their order."""
        _, index = lax.top_k(jnp.moveaxis(self._wanted(cache), 1, 2), self.slots)
        index = jnp.moveaxis(jnp.sort(index, axis=-1), 2, 1)

        def taken(x: Array, _: Array) -> Array:
            return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 3)), axis=1)

        return _map(taken, cache, cache)


def watched_attention(
    q: Float[Array, "b t h p"], cache: Watched, place: Int[Array, "t"], real: Bool[Array, "b t"]
) -> tuple[Float[Array, "b t h p"], Float[Array, "b s g"]]:
    """Causal attention over keys that stand at other places for each head, and what each key receives in all.

    What queries that are not ``real`` give counts nothing.
    """
    b, t, h, p = q.shape
    rows = min(t, ROWS)
    pieces, extra = -(-t // rows), -t % rows
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0))).reshape(b, pieces, rows, h, p)
    real = jnp.pad(real, ((0, 0), (0, extra))).reshape(b, pieces, rows)
    stands = jnp.pad(place, (0, extra), constant_values=-1).reshape(pieces, rows)

    def one(mass: Array, part: Any) -> tuple[Array, Array]:
        q, real, stands = part
        mixed, own = _piece(q, real, stands, cache)
        return mass + own, mixed

    parts = jnp.moveaxis(q, 1, 0), jnp.moveaxis(real, 1, 0), stands
    mass, mixed = lax.scan(one, jnp.zeros(cache.places.shape, jnp.float32), parts)
    return jnp.moveaxis(mixed, 0, 1).reshape(b, -1, h, p)[:, :t], mass


def _piece(
    q: Float[Array, "b r h p"], real: Bool[Array, "b r"], place: Int[Array, "r"], cache: Watched
) -> tuple[Float[Array, "b r h p"], Float[Array, "b s g"]]:
    b, r, h, p = q.shape
    k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
    split = q.reshape(b, r, k.shape[2], -1, p)
    scores = jnp.einsum("brgip,bsgp->bgirs", split, k, preferred_element_type=jnp.float32)
    keys = jnp.moveaxis(cache.places, 1, 2)[:, :, None, None]
    seen = (keys >= 0) & (keys <= place[:, None])
    weights = jax.nn.softmax(scores / math.sqrt(p), axis=-1, where=seen)
    weights = jnp.where(seen & real[:, None, None, :, None], weights, 0.0)
    mixed = jnp.einsum(
        "bgirs,bsgp->brgip", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return mixed.reshape(b, r, h, p).astype(q.dtype), jnp.moveaxis(weights.sum((2, 3)), 1, 2)


def _map(fn: Any, cache: Watched, other: Watched) -> Watched:
    names = ("keys", "values", "places", "scores")
    return dataclasses.replace(
        cache, **{n: fn(getattr(cache, n), getattr(other, n)) for n in names}
    )


def _joined(cache: Watched, new: Watched) -> Watched:
    return _map(lambda x, y: jnp.concatenate([x, y], axis=1), cache, new)
