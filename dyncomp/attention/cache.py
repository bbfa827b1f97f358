"""Key/value caches: a frozen policy (how) and an explicit pytree (what).

A policy has ``init(...) -> state``, ``attend(state, asked) -> (state, mixed, work)`` and ``truncate(state, length)``.
The state names its policy as static data, so attention needs nothing but the state, and jit can donate it. This file
keeps everything; policies that keep less or read less are in files of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.attention.asked import Asked, Work
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int


@runtime_checkable
class CachePolicy(Protocol):
    """What ``Attention.cache`` makes, called with ``max_length``."""

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> Any:
        """An empty state, a `CacheState`."""
        ...

    def attend(self, cache: Any, asked: Asked) -> tuple[Any, Float[Array, "b t h p"], Work]:
        """Takes in the new positions; what they read, and what that cost."""
        ...

    def truncate(self, cache: Any, length: Array) -> Any:
        """Without the places from ``length`` ([] or [b]) on, which may not have displaced others."""
        ...


class CacheState:
    """Marks the states of policies among pytrees.

    Attributes:
      length: int32 [], places given out so far, the same for every sequence.
      policy: the policy that made it (static).
    """

    length: Any
    policy: Any

    def seen(self) -> Int[Array, "b"]:
        """How many real tokens each sequence can still look at."""
        raise NotImplementedError

    def handed(self) -> Mapping[str, Array]:
        """What the last pass hands up to the next layer's policy of its kind, under names of its own; mostly nothing.

        It arrives as `Asked.below`, and the first layer finds zeros.
        """
        return {}


@struct.dataclass
class KVCache(CacheState):
    """Keys and values of the positions seen so far; scanned layers stack it along a leading axis.

    They lie as the two products of a decode step read them, so that no step turns them: keys by width, values by slot.

    Attributes:
      keys: [b g p s], already rotated; zeros in empty slots.
      values: [b g s p].
      positions: int32 [b s], the slot's place in its sequence; -1 where empty or padding.
      length: int32 [], slots filled, the same for every sequence (ragged prompts are padded and masked).
      policy: the policy that made it (static).
    """

    keys: Float[Array, "*l b g p s"]
    values: Float[Array, "*l b g s p"]
    positions: Int[Array, "*l b s"]
    length: Int[Array, "*l"]
    policy: Any = struct.field(pytree_node=False)

    def seen(self) -> Int[Array, "b"]:
        """How many real tokens each sequence holds."""
        return jnp.sum(self.positions >= 0, axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class FullCache:
    """Keeps every key and value.

    Attributes:
      max_length: slots; prompt and generated tokens together must fit.
    """

    max_length: int

    def __post_init__(self):
        if self.max_length < 1:
            raise DyncompError(f"FullCache.max_length={self.max_length}: give at least 1 slot")

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> KVCache:
        """An empty cache for ``batch`` sequences."""
        slots = self.max_length
        keys = jnp.zeros((batch, kv_heads, head_dim, slots), dtype)
        values = jnp.zeros((batch, kv_heads, slots, head_dim), dtype)
        empty = jnp.full((batch, slots), -1, jnp.int32)
        return KVCache(keys, values, empty, jnp.int32(0), self)

    def extend(
        self,
        cache: KVCache,
        k: Float[Array, "b t g p"],
        v: Float[Array, "b t g p"],
        mask: Bool[Array, "b t"] | None = None,
    ) -> tuple[KVCache, Float[Array, "b s g p"], Float[Array, "b s g p"], Int[Array, "b s"]]:
        """Appends t positions; returns the new cache and what attention looks at, token by token.

        The fill level is a run-time value, so running past the end while decoding cannot raise; it writes NaN
        keys instead of silently overwriting the last slots.

        Args:
          mask: False for padding, which no query will see.

        Raises:
          DyncompError: t alone exceeds ``max_length``.
        """
        k, place = newcomers(cache, k, mask, self.max_length)
        at = cache.length
        keys = write_slots(cache.keys, jnp.transpose(k, (0, 2, 3, 1)), at, 3)
        values = write_slots(cache.values, jnp.swapaxes(v, 1, 2), at, 2)
        positions = write_slots(cache.positions, place, at, 1)
        state = KVCache(keys, values, positions, at + k.shape[1], self)
        return state, *by_token(keys, values), positions

    def attend(self, cache: KVCache, asked: Asked) -> tuple[KVCache, Float[Array, "b t h p"], Work]:
        """Everything that the mixer lets a position see."""
        q, k = asked.turned()
        cache, keys, values, key_place = self.extend(cache, k, asked.v, asked.real)
        mixed, pairs = asked.mix(q, keys.astype(q.dtype), values.astype(q.dtype), key_place)
        return cache, mixed, Work(pairs)

    def truncate(self, cache: KVCache, length: Int[Array, ""] | Int[Array, "b"]) -> KVCache:
        """They are written again."""
        positions = positions_before(cache, length)
        return KVCache(cache.keys, cache.values, positions, jnp.max(length), cache.policy)


def newcomers(
    cache: Any, k: Float[Array, "b t g p"], mask: Bool[Array, "b t"] | None, slots: int
) -> tuple[Float[Array, "b t g p"], Int[Array, "b t"]]:
    """New keys as a cache of ``slots`` takes them in behind ``cache.length``, and their places, -1 for padding.

    Raises:
      DyncompError: they alone are more than ``slots``; past the end of a cache that other passes filled they are NaN.
    """
    new = k.shape[1]
    if new > slots:
        raise DyncompError(
            f"{new} tokens do not fit a cache of {slots}; raise max_length or cut the prompt"
        )
    nan = jnp.asarray(jnp.nan, cache.keys.dtype)
    k = jnp.where(cache.length + new <= slots, k.astype(cache.keys.dtype), nan)
    place = jnp.broadcast_to(cache.length + jnp.arange(new, dtype=jnp.int32), k.shape[:2])
    return k, place if mask is None else jnp.where(mask, place, -1)


def by_token(
    keys: Float[Array, "b g p s"], values: Float[Array, "b g s p"]
) -> tuple[Float[Array, "b s g p"], Float[Array, "b s g p"]]:
    """A `KVCache`'s keys and values token by token; attention turns them back, which the compiler cancels."""
    return jnp.transpose(keys, (0, 3, 1, 2)), jnp.swapaxes(values, 1, 2)


def push_newest(cache: KVCache, source: KVCache) -> KVCache:
    """``cache`` with one more slot, a copy of the newest of ``source``."""
    at = source.length - 1
    keys, values = by_token(_slot(source.keys, at, 3), _slot(source.values, at, 2))
    state, *_ = cache.policy.extend(cache, keys, values, _slot(source.positions, at, 1) >= 0)
    return state


def replace_newest(cache: KVCache, source: KVCache, rows: Bool[Array, "b"]) -> KVCache:
    """``cache`` with the newest keys and values of ``rows`` taken from the newest slot of ``source``."""

    def merged(own: Array, other: Array, axis: int) -> Array:
        new, old = _slot(other, source.length - 1, axis), _slot(own, cache.length - 1, axis)
        chosen = jnp.where(rows[:, None, None, None], new, old)
        return write_slots(own, chosen, cache.length - 1, axis)

    keys, values = merged(cache.keys, source.keys, 3), merged(cache.values, source.values, 2)
    return KVCache(keys, values, cache.positions, cache.length, cache.policy)


def truncate(cache: Any, length: Int[Array, ""] | Int[Array, "b"]) -> Any:
    """A `CacheState` without the slots from ``length`` on: they count as empty and are written again.

    With a length for each row, shorter rows keep empty slots up to the longest.
    """
    return cache.policy.truncate(cache, length)


def keep_slots(cache: KVCache, start: Int[Array, ""], slots: Int[Array, "b p"]) -> KVCache:
    """``cache`` with only some of the slots from ``start`` on, moved together.

    Args:
      start: how many slots stay as they are.
      slots: int32, which later ones each row keeps, counted from ``start``, in their new order; -1, at a row's end,
        keeps none.
    """
    kept, p = slots >= 0, slots.shape[1]
    from_ = start + jnp.maximum(slots, 0)

    def moved(x: Array, axis: int) -> Array:
        index = jnp.expand_dims(from_, [n for n in (1, 2, 3) if n != axis])
        return write_slots(x, jnp.take_along_axis(x, index, axis=axis), start, axis)

    place = start + jnp.arange(p, dtype=jnp.int32)
    positions = write_slots(cache.positions, jnp.where(kept, place[None], -1), start, 1)
    state = KVCache(
        moved(cache.keys, 3), moved(cache.values, 2), positions, cache.length, cache.policy
    )
    return truncate(state, start + jnp.max(jnp.sum(kept, axis=1, dtype=jnp.int32)))


def _slot(x: Array, at: Int[Array, ""], axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, 1, axis=axis)


def positions_before(cache: Any, length: Int[Array, ""] | Int[Array, "b"]) -> Int[Array, "b s"]:
    """``cache.positions`` without the slots from ``length`` on; slots lie in the order of their places."""
    slot = jnp.arange(cache.positions.shape[1], dtype=jnp.int32)[None]
    return jnp.where(slot < jnp.reshape(length, (-1, 1)), cache.positions, -1)


def write_slots(x: Array, new: Array, at: Int[Array, ""], axis: int) -> Array:
    """``x`` with ``new`` from slot ``at`` of ``axis`` on, in place where it is donated."""
    return lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, axis)
