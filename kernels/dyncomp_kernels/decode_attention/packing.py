"""Small integers, several to a byte, and numbers that are stored so."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


def pieces(bits: int) -> tuple[int, ...]:
    """The powers of two that make up ``bits``, largest first: 3 bits lie as a field of 2 and one of 1.

    Raises:
      ValueError: not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"packing: {bits} bits; use 1 to 8")
    return tuple(size for size in (8, 4, 2, 1) if bits & size)


def row_bytes(width: int, bits: int) -> int:
    """Bytes of ``width`` codes.

    Raises:
      ValueError: the width does not fill whole bytes.
    """
    if width * pieces(bits)[-1] % 8:
        raise ValueError(
            f"packing: rows of {width} at {bits} bits fill no whole bytes; use a multiple of {8 // pieces(bits)[-1]}"
        )
    return width * bits // 8


def pack(codes: Array, bits: int) -> Array:
    """uint8 [... p], each below 2^bits, as uint8 [... p bits / 8]; inverse of `unpack`."""
    row_bytes(codes.shape[-1], bits)
    parts, shift = [], 0
    for size in pieces(bits):
        field = (codes >> shift) & (2**size - 1)
        shift += size
        each = 8 // size
        # Code i lies beside code i + p/each, so that unpacking moves whole halves (quarters) of a row.
        split = field.reshape(*field.shape[:-1], each, -1)
        moved = [split[..., i, :] << (i * size) for i in range(each)]
        parts.append(sum(moved[1:], start=moved[0]))
    return jnp.concatenate(parts, axis=-1).astype(jnp.uint8)


def unpack(packed: Array, bits: int) -> Array:
    """uint8 [... p]."""
    width, at, shift = packed.shape[-1] * 8 // bits, 0, 0
    codes = jnp.zeros((*packed.shape[:-1], width), jnp.uint8)
    for size in pieces(bits):
        own = packed[..., at : at + width * size // 8]
        at += width * size // 8
        each = [(own >> (i * size)) & (2**size - 1) for i in range(8 // size)]
        codes = codes | (jnp.concatenate(each, axis=-1) << shift)
        shift += size
    return codes.astype(jnp.uint8)


def to_bytes(x: Array) -> Array:
    """Floats [... p] as uint8 [... p itemsize], bit for bit."""
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def from_bytes(packed: Array, dtype: Any) -> Array:
    """Inverse of `to_bytes`."""
    size = jnp.dtype(dtype).itemsize
    split = packed.reshape(*packed.shape[:-1], -1, size)
    return lax.bitcast_convert_type(split, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Numbers [b g m p], each (code x step + low) x scale.

    Attributes:
      codes: uint8 [b g m w], w = p bits / 8; with ``bits`` None the numbers themselves, floats [b g m p].
      low, step: float32, broadcast to [b g m p]: [b g 1 p] for keys, each channel its own, [b 1 m 1] for values, each
        slot its own.
      scale: float32 [b g 1 p].
      bits: of a code (static); None for none.
    """

    codes: Any
    low: Any
    step: Any
    scale: Any
    bits: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def plain(cls, x: Array) -> "Packed":
        """Floats as they are."""
        one = jnp.ones((1, 1, 1, 1), jnp.float32)
        return cls(x, 0 * one, one, one)

    @property
    def slots(self) -> int:
        """m."""
        return self.codes.shape[2]

    def numbers(self, codes: Array | None = None) -> Array:
        """Codes, all or the given ones, as floats [b g m p], neither stepped nor scaled."""
        codes = self.codes if codes is None else codes
        return codes if self.bits is None else unpack(codes, self.bits).astype(jnp.float32)

    def whole(self) -> Array:
        """Everything at once, float32 [b g m p]: the definition."""
        return (self.numbers().astype(jnp.float32) * self.step + self.low) * self.scale
