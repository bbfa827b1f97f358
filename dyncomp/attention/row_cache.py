"""A key/value cache whose rows stand at places of their own, for rows that decode at different speeds."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct

from dyncomp.attention.asked import Asked, Work, put
from dyncomp.attention.attend import attend
from dyncomp.attention.cache import CacheState
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int


@struct.dataclass
class RowCache(CacheState):
    """Keys and values by slot; which slot is written and how many are read is told by the positions of a pass.

    Attributes:
      keys, values: [b s g p], as they are read; what lies behind a row's newest position means nothing.
      policy: the policy that made it (static).
    """

    keys: Any  # unchecked: jax also builds trees of shapes
    values: Any
    policy: Any = struct.field(pytree_node=False)

    @property
    def length(self) -> Int[Array, ""]:  # pyrefly: ignore
        """No place is given out: passes bring their positions."""
        return jnp.int32(0)

    def seen(self) -> Int[Array, "b"]:
        """Nothing is known without positions."""
        return jnp.zeros((self.keys.shape[0],), jnp.int32)


@dataclasses.dataclass(frozen=True)
class RowSlots:
    """Takes one new position a pass, each row's in the slot that ``positions`` names; slots up to it are read.

    Attributes:
      max_length: slots.
    """

    max_length: int

    def __post_init__(self):
        if self.max_length < 1:
            raise DyncompError(f"RowSlots.max_length={self.max_length}: give at least 1 slot")

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> RowCache:
        """An empty cache for ``batch`` sequences."""
        empty = jnp.zeros((batch, self.max_length, kv_heads, head_dim), dtype)
        return RowCache(empty, empty, self)

    def attend(
        self, cache: RowCache, asked: Asked
    ) -> tuple[RowCache, Float[Array, "b t h p"], Work]:
        """The new position and those before it in its row.

        Raises:
          DyncompError: more than one new position.
        """
        asked.check_plain(self)
        b, t = asked.q.shape[:2]
        if t != 1:
            raise DyncompError(f"RowSlots takes one position a pass, not {t}; use FullCache")
        q, k = asked.turned()
        at = jnp.broadcast_to(asked.positions[:, 0], (b,))
        keys, values = put(cache.keys, at, k[:, 0]), put(cache.values, at, asked.v[:, 0])
        slots = jnp.arange(self.max_length, dtype=jnp.int32)
        allowed = slots[None, None, :] <= at[:, None, None]
        mixed = attend(q, keys.astype(q.dtype), values.astype(q.dtype), allowed)
        work = Work(jnp.int32(self.max_length), at + 1)
        return RowCache(keys, values, self), mixed, work

    def truncate(self, cache: RowCache, length: Array) -> RowCache:
        """As it is: later slots are not read before they are written."""
        return cache


def copy_slot(
    cache: RowCache, source: RowCache, at: Int[Array, "b"], rows: Bool[Array, "b"]
) -> RowCache:
    """``cache`` with slot ``at`` of ``rows`` taken from another layer; all else stays."""

    def merged(own: Array, other: Array) -> Array:
        slots = jnp.arange(own.shape[1], dtype=jnp.int32)
        here = (slots[None] == at[:, None]) & rows[:, None]
        return jnp.where(here[:, :, None, None], other, own)

    keys, values = merged(cache.keys, source.keys), merged(cache.values, source.values)
    return RowCache(keys, values, cache.policy)
