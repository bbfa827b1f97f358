"""Which keys a query may see, as a rule that is asked for one block at a time."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.core.typing import Array, Bool, Int

UNSEEN = jnp.iinfo(jnp.int32).max


@struct.dataclass
class Sight:
    """What t queries may see of s slots.

    Attributes:
      place: int32 [t], where each query stands in the order of slots, ascending.
      key_place: int32 [#b s], where each key stands; -1 for empty slots and padding.
      visible: bool [#b t w], of the newest w slots which ones each query may see (w = t: a tree); None for all.
      causal: a query sees no key behind itself (static).
      window: a query sees itself and the ``window - 1`` places before it; None for all (static).
      anchored: bool [#b s], slots that a window does not hide (attention sinks); None for none.
      end: int32 [b], one past the place of each sequence's newest token, where sequences end apart (`compacted`); None
        where the last query is the newest of all.
    """

    place: Any  # unchecked: jax also builds trees of cotangents
    key_place: Any
    visible: Any = None
    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    anchored: Any = None
    end: Any = None

    def ends(self) -> Int[Array, "#b"]:
        """One past the newest token of each sequence."""
        return self.place[-1:] + 1 if self.end is None else self.end

    def all(self) -> Bool[Array, "#b t s"]:
        """The whole table."""
        return self.block(0, self.place.shape[0], 0, self.key_place.shape[1])

    def block(
        self, row: Array | int, rows: int, column: Array | int, columns: int
    ) -> Bool[Array, "#b r c"]:
        """The table of ``rows`` queries from ``row`` on and ``columns`` slots from ``column`` on."""
        place = lax.dynamic_slice_in_dim(self.place, row, rows)[None, :, None]
        keys = lax.dynamic_slice_in_dim(self.key_place, column, columns, axis=1)[:, None, :]
        seen = jnp.broadcast_to(keys >= 0, (keys.shape[0], rows, columns))
        if self.causal:
            seen = seen & (keys <= place)
        if self.window is not None:
            near = keys > place - self.window
            if self.anchored is not None:
                held = lax.dynamic_slice_in_dim(self.anchored, column, columns, axis=1)
                near = near | held[:, None, :]
            seen = seen & near
        if self.visible is None:
            return seen
        told = lax.dynamic_slice_in_dim(self.visible, row, rows, axis=1)
        return seen & ~_hidden(told, self.place[-1] + 1, column, columns)

    def reach(
        self, row: Array | int, rows: int, columns: int
    ) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """First block of ``columns`` slots that ``rows`` queries from ``row`` on see, and the one past the last.

        At least one block; there may be unseen ones between them.
        """
        keys = self.key_place
        blocks = -(-keys.shape[1] // columns)
        split = lambda x, fill: jnp.pad(
            x, ((0, 0), (0, blocks * columns - x.shape[1])), constant_values=fill
        ).reshape(-1, blocks, columns)
        keys = split(keys, -1)
        lowest = jnp.min(jnp.where(keys >= 0, keys, UNSEEN), axis=(0, 2))
        highest = jnp.max(keys, axis=(0, 2))
        wanted = highest >= 0
        if self.causal:
            wanted = wanted & (lowest <= self.place[jnp.minimum(row + rows, len(self.place)) - 1])
        if self.window is not None:
            near = highest > self.place[row] - self.window
            if self.anchored is not None:
                near = near | jnp.any(split(self.anchored, False), axis=(0, 2))
            wanted = wanted & near
        first = jnp.argmax(wanted).astype(jnp.int32)
        past = jnp.int32(blocks) - jnp.argmax(wanted[::-1]).astype(jnp.int32)
        return first, jnp.where(jnp.any(wanted), past, first + 1)


def _hidden(
    visible: Bool[Array, "#b r w"], end: Array, column: Array | int, columns: int
) -> Bool[Array, "#b r c"]:
    """Which slots ``visible``, of the newest w below ``end``, forbids."""
    width = visible.shape[-1]
    place = column + jnp.arange(columns, dtype=jnp.int32) - (end - width)
    inside = (place >= 0) & (place < width)
    told = jnp.take(visible, jnp.clip(place, 0, width - 1), axis=-1)
    return inside[None, None] & ~told
