"""Keys and values that lie token by token, for policies that move or gather single tokens."""

from typing import Any

import jax.numpy as jnp
from flax import struct

from dyncomp.attention.cache import CacheState
from dyncomp.core.typing import Array, Float, Int


@struct.dataclass
class TokenCache(CacheState):
    """As `KVCache`, in the order in which tokens come.

    Attributes:
      keys: [b s g p].
      values: [b s g p].
      positions: int32 [b s], places; -1 where empty or padding.
      length: int32 [], places given out so far.
      policy: static.
    """

    keys: Float[Array, "*l b s g p"]
    values: Float[Array, "*l b s g p"]
    positions: Int[Array, "*l b s"]
    length: Int[Array, "*l"]
    policy: Any = struct.field(pytree_node=False)

    def seen(self) -> Int[Array, "b"]:
        """Real tokens of each sequence."""
        return jnp.sum(self.positions >= 0, axis=1, dtype=jnp.int32)
