"""Tokens of two precisions in one store of a fixed size, whose split is a run-time value."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import struct

from dyncomp.attention.asked import pick
from dyncomp.attention.quantise import quantised_keys, quantised_values
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels.decode_attention.packed import BLOCK, blocks_between, packed_attention
from dyncomp_kernels.decode_attention.packing import Packed, from_bytes, row_bytes
from dyncomp_kernels.sparse_attention.api import merged


@struct.dataclass
class Stored:
    """Keys and values of n slots: important ones from the front, the others from the back.

    Each end has quantisers of its own, and its tokens stand in the order of their places, counted from the end.

    Attributes:
      keys, values: uint8 [b g y], rows of both precisions: what is left between the ends is empty.
      key_low, key_step, value_scale: float32 [b 2 g p], of the front and the back.
      value_low, value_step: float32 [b n], of the front's slots and, from the other end, of the back's.
      positions: int32 [b n], the tokens' places in the same order; -1 where empty.
      count: int32 [b], tokens at the front.
    """

    keys: Any
    values: Any
    key_low: Any
    key_step: Any
    value_scale: Any
    value_low: Any
    value_step: Any
    positions: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class TwoEnded:
    """How n tokens are stored, at most ``most`` of them at the front.

    Bytes for n tokens at ``low`` bits and ``most`` times the difference are all there is, since a token that is not at
    the front is at the back: no cap on the back is needed.

    Attributes:
      slots: n.
      most: cap on the front, at most n.
      high, low: bits of the front and the back, 1 to 8; None for the numbers themselves.
      dtype: of those.
    """

    slots: int
    most: int
    high: int | None
    low: int | None
    dtype: str

    def row(self, width: int, bits: int | None) -> int:
        """Bytes of a head's keys (or values) of one token."""
        return width * jnp.dtype(self.dtype).itemsize if bits is None else row_bytes(width, bits)

    def size(self, width: int) -> int:
        """Bytes of a head's keys."""
        high, low = self.row(width, self.high), self.row(width, self.low)
        return self.slots * low + self.most * max(high - low, 0)

    def empty(self, batch: int, kv_heads: int, width: int) -> Stored:
        """No token."""
        codes = jnp.zeros((batch, kv_heads, self.size(width)), jnp.uint8)
        zeros = jnp.zeros((batch, 2, kv_heads, width), jnp.float32)
        each = jnp.zeros((batch, self.slots), jnp.float32)
        places = jnp.full((batch, self.slots), -1, jnp.int32)
        ones, count = jnp.ones_like(zeros), jnp.zeros((batch,), jnp.int32)
        # Leaves of their own: a state is donated.
        return Stored(codes, codes + 0, zeros, ones, ones + 0, each, each + 0, places, count)

    def pack(
        self,
        k: Float[Array, "b t g p"],
        v: Float[Array, "b t g p"],
        places: Int[Array, "b t"],
        order: Int[Array, "b t"],
        count: Int[Array, "b"],
    ) -> Stored:
        """At most n tokens.

        Args:
          k: rotated already.
          places: -1 for padding, which is not stored.
          order: `importance.Chosen.order`: those for the front, those for the back, the rest.
          count: tokens for the front, at most ``most``.
        """
        tokens = jnp.sum(places >= 0, axis=1, dtype=jnp.int32)
        front = jnp.arange(self.most, dtype=jnp.int32)[None]
        back = count[:, None] + jnp.arange(self.slots, dtype=jnp.int32)[None, ::-1]
        end = functools.partial(self._end, k, v, places, order)
        first = end(front, front < count[:, None], self.high)
        return self._joined(first, end(back, back < tokens[:, None], self.low), count)

    def _end(self, k, v, places, order, at, seen, bits):
        """Packed keys and values, and places, of the tokens that ``at`` names in ``order``."""
        index = jnp.take_along_axis(order, jnp.minimum(at, order.shape[1] - 1), axis=1)
        heads_first = lambda x: jnp.swapaxes(pick(x, index).astype(self.dtype), 1, 2)
        own = jnp.where(seen, jnp.take_along_axis(places, index, axis=1), -1)
        keys = quantised_keys(heads_first(k), seen, bits)
        return keys, quantised_values(heads_first(v), seen, bits), own

    def _joined(self, front, back, count: Array) -> Stored:
        (keys, values, places), (other_keys, other_values, other_places) = front, back
        b, g, _, row = keys.codes.shape
        width = row * 8 // self.high if self.high else row // jnp.dtype(self.dtype).itemsize
        size = self.size(width)

        def codes(first: Array, last: Array) -> Array:
            first, last = (x.reshape(b, g, -1) for x in (first, last))
            first = jnp.pad(first, ((0, 0), (0, 0), (0, size - first.shape[2])))
            last = jnp.pad(last, ((0, 0), (0, 0), (size - last.shape[2], 0)))
            own = jnp.arange(size, dtype=jnp.int32)[None] < (count * row)[:, None]
            return jnp.where(own[:, None], first, last)

        def slots(first: Array, last: Array) -> Array:
            own = jnp.arange(self.slots, dtype=jnp.int32)[None]
            first = jnp.pad(first, ((0, 0), (0, self.slots - self.most)))
            return jnp.where(own < count[:, None], first, last)

        full = lambda x: jnp.broadcast_to(x, (b, g, 1, width))[:, :, 0]
        each = lambda x, n: jnp.broadcast_to(x, (b, 1, n, 1))[:, 0, :, 0]
        both = lambda x, y: jnp.stack([full(x), full(y)], axis=1)
        value = lambda x, y: slots(each(x, self.most), each(y, self.slots))
        return Stored(
            codes(keys.codes, other_keys.codes),
            codes(values.codes, other_values.codes),
            both(keys.low, other_keys.low),
            both(keys.step, other_keys.step),
            both(values.scale, other_values.scale),
            value(values.low, other_values.low),
            value(values.step, other_values.step),
            slots(places, other_places),
            count,
        )

    def ends(self, stored: Stored) -> list[tuple[Packed, Packed, Bool[Array, "b m"], Array]]:
        """Keys, values, seen slots and places of the front and of the back, the latter's first token last."""
        found = []
        for end, (bits, m) in enumerate(((self.high, self.most), (self.low, self.slots))):
            cut = slice(0, m) if end == 0 else slice(self.slots - m, self.slots)
            own = jnp.arange(self.slots, dtype=jnp.int32)[None] < stored.count[:, None]
            own = own if end == 0 else ~own
            places = jnp.where(own, stored.positions, -1)[:, cut]
            channel = lambda x, end=end: x[:, end][:, :, None]
            slot = lambda x, cut=cut: x[:, None, cut, None]
            one = jnp.ones((1, 1, 1, 1), jnp.float32)
            codes = [
                self._rows(x, end, bits, places >= 0, stored) for x in (stored.keys, stored.values)
            ]
            keys = Packed(codes[0], channel(stored.key_low), channel(stored.key_step), one, bits)
            scale = channel(stored.value_scale)
            values = Packed(codes[1], slot(stored.value_low), slot(stored.value_step), scale, bits)
            found.append((keys, values, places >= 0, places))
        return found

    def _rows(self, x: Array, end: int, bits: int | None, seen: Array, stored: Stored) -> Array:
        (b, g, size), m = x.shape, seen.shape[1]
        row = self.row(stored.key_low.shape[-1], bits)
        own = x[:, :, : m * row] if end == 0 else x[:, :, size - m * row :]
        own = own.reshape(b, g, m, row)
        if bits is not None:
            return own
        # Bytes of the other end need not be numbers.
        return jnp.where(seen[:, None, :, None], from_bytes(own, self.dtype), 0)

    def attend(
        self, stored: Stored, q: Float[Array, "b t h p"]
    ) -> tuple[tuple[Float[Array, "b t h p"], Float[Array, "b t h"]], Int[Array, ""]]:
        """Attention of queries behind all tokens, its log-sum-exp, and the slots read of a sequence."""
        front = jnp.max(stored.count)
        bounds = (0, front), (jnp.min(_first(stored)), self.slots)
        parts, read = [], jnp.int32(0)
        for (keys, values, seen, _), (begin, end) in zip(self.ends(stored), bounds, strict=True):
            parts.append(packed_attention(q, keys, values, seen, begin, end))
            first, past = blocks_between(begin, end, keys.slots)
            read = read + (past - first) * min(BLOCK, keys.slots)
        return merged(parts), read


def _first(stored: Stored) -> Int[Array, "b"]:
    """First slot of the back."""
    n = stored.positions.shape[1]
    slot = jnp.arange(n, dtype=jnp.int32)[None]
    there = (stored.positions >= 0) & (slot >= stored.count[:, None])
    return jnp.min(jnp.where(there, slot, n), axis=1)
