"""Caches that forget: a fixed number of slots, whatever the length of the text."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dyncomp.attention.asked import Asked, Work, dense_pairs, in_chunks, pick, put
from dyncomp.attention.token_cache import TokenCache
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class SinkWindow:
    """The first ``sink`` tokens and the ``window`` newest (StreamingLLM, arXiv 2309.17453).

    A position sees exactly those, itself included, in long passes too, which are read in pieces. Keys keep their
    positions in the text; the paper's own places them within the cache.

    Attributes:
      max_length: accepted, as all policies are called with it; the cache has ``sink + window`` slots at most.
      sink, window: tokens.
      piece: positions of a long pass that are read at once.
    """

    max_length: int
    sink: int = 4
    window: int = 508
    piece: int = 256

    def __post_init__(self):
        if min(self.max_length, self.window, self.piece) < 1 or self.sink < 0:
            raise DyncompError(
                f"SinkWindow: max_length={self.max_length}, sink={self.sink}, window={self.window}, piece={self.piece};"
                " use 1 or more (sink: 0 or more)"
            )

    forgets = True

    @property
    def slots(self) -> int:
        """Of the cache."""
        return min(self.max_length, self.sink + self.window)

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> TokenCache:
        """Empty; the first ``sink`` tokens will lie first."""
        shape = (batch, self.slots, kv_heads, head_dim)
        empty = jnp.full(shape[:2], -1, jnp.int32)
        return TokenCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, jnp.int32(0), self
        )

    def attend(
        self, cache: TokenCache, asked: Asked
    ) -> tuple[TokenCache, Float[Array, "b t h p"], Work]:
        """Piece by piece."""
        asked.check_plain(self)
        after, mixed, work = in_chunks(asked, self.piece, cache, self._step)
        return dataclasses.replace(after, length=cache.length + asked.q.shape[1]), mixed, work

    def truncate(self, cache: TokenCache, length: Int[Array, ""] | Int[Array, "b"]) -> TokenCache:
        """Places from ``length`` on are forgotten; what they displaced does not come back."""
        gone = cache.positions >= jnp.reshape(length, (-1, 1))
        positions = jnp.where(gone, -1, cache.positions)
        return TokenCache(cache.keys, cache.values, positions, jnp.max(length), self)

    def _step(self, cache: TokenCache, asked: Asked) -> tuple[TokenCache, Array, Work]:
        needed = dense_pairs(asked, cache.seen(), self.sink + self.window)
        q, k = asked.turned()
        if q.shape[1] == 1:
            cache = self._one(cache, k, asked.v, asked.own_place())
            held = jnp.broadcast_to(jnp.arange(self.slots) < self.sink, cache.positions.shape)
            return self._look(cache, cache, held, asked, q, needed)
        join = lambda old, x: jnp.concatenate([old, x.astype(old.dtype)], axis=1)
        both = TokenCache(
            join(cache.keys, k),
            join(cache.values, asked.v),
            join(cache.positions, asked.own_place()),
            cache.length + q.shape[1],
            self,
        )
        rank = _ranks(both.positions)
        return self._look(self._kept(both, rank), both, rank < self.sink, asked, q, needed)

    def _look(
        self, after, shown: TokenCache, anchored: Array, asked: Asked, q: Array, needed
    ) -> Any:
        """Attention over ``shown``; the first real tokens of each row are anchored."""
        mixed, pairs = asked.mix(
            q,
            shown.keys.astype(q.dtype),
            shown.values.astype(q.dtype),
            shown.positions,
            window=self.window,
            anchored=anchored,
        )
        return after, mixed, Work(pairs, needed)

    def _one(self, cache: TokenCache, k: Array, v: Array, place: Array) -> TokenCache:
        """One token a row, over the oldest that is no sink; padding takes no slot."""
        slot = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)
        held = (cache.positions >= 0) & (slot < self.sink)[None]
        age = jnp.where(held, jnp.iinfo(jnp.int32).max, cache.positions)
        at, real = jnp.argmin(age, axis=1).astype(jnp.int32), place[:, 0] >= 0

        def written(x: Array, new: Array) -> Array:
            own = pick(x, at[:, None])[:, 0]
            keep = real.reshape(-1, *[1] * (own.ndim - 1))
            return put(x, at, jnp.where(keep, new[:, 0].astype(x.dtype), own))

        keys, values = written(cache.keys, k), written(cache.values, v)
        return TokenCache(keys, values, written(cache.positions, place), cache.length + 1, self)

    def _kept(self, both: TokenCache, rank: Int[Array, "b s"]) -> TokenCache:
        """The sinks, in the first slots, and the newest."""
        real = both.positions >= 0
        count = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
        keep = real & ((rank < self.sink) | (rank >= count - self.window))
        order = jnp.argsort(jnp.where(keep, rank, UNRANKED), axis=1, stable=True)
        index = order[:, : self.slots].astype(jnp.int32)
        there = pick(keep, index)
        positions = jnp.where(there, pick(both.positions, index), -1)
        return TokenCache(
            pick(both.keys, index), pick(both.values, index), positions, both.length, self
        )


UNRANKED = jnp.iinfo(jnp.int32).max


def _ranks(place: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """How many real tokens precede each; of empty slots `UNRANKED`."""
    order = jnp.argsort(jnp.where(place < 0, UNRANKED, place), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True).astype(jnp.int32)
    return jnp.where(place < 0, UNRANKED, rank)
