"""Uniform asymmetric quantisers of keys and values (ZipCache, arXiv 2405.14256, as ZipVL uses it)."""

import jax.numpy as jnp

from dyncomp.core.typing import Array, Bool, Float
from dyncomp_kernels.decode_attention.packing import Packed, pack, to_bytes


def quantised_keys(
    keys: Float[Array, "b g m p"], seen: Bool[Array, "b m"], bits: int | None
) -> Packed:
    """Each channel of a head over all seen slots: step (max - min) / (2^bits - 1), round to nearest.

    Keys must have their positions already. Slots that are not seen hold anything. With ``bits`` None: the bytes of the
    numbers themselves, which `unpacked` takes back.
    """
    if bits is None:
        return _raw(keys)
    low, step = _range(keys, seen, 2, bits)
    return Packed(pack(_codes(keys, low, step, bits), bits), low, step, _one(), bits)


def quantised_values(
    values: Float[Array, "b g m p"], seen: Bool[Array, "b m"], bits: int | None
) -> Packed:
    """Each slot over all channels of all heads, after each channel was divided by the root of its largest magnitude."""
    if bits is None:
        return _raw(values)
    wide = jnp.where(seen[:, None, :, None], values.astype(jnp.float32), 0.0)
    scale = jnp.sqrt(jnp.max(jnp.abs(wide), axis=2, keepdims=True))
    scale = jnp.where(scale > 0, scale, 1.0)
    low, step = _range(wide / scale, seen, (1, 3), bits)
    return Packed(pack(_codes(wide / scale, low, step, bits), bits), low, step, scale, bits)


def _raw(x: Array) -> Packed:
    one = _one()
    return Packed(to_bytes(x), 0 * one, one, one, None)


def _one() -> Array:
    return jnp.ones((1, 1, 1, 1), jnp.float32)


def _range(x: Array, seen: Array, axis, bits: int) -> tuple[Array, Array]:
    """Lowest value and step, float32; step 1 where nothing varies, so that nothing is divided by 0."""
    there, wide = seen[:, None, :, None], x.astype(jnp.float32)
    low = jnp.min(jnp.where(there, wide, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(there, wide, -jnp.inf), axis=axis, keepdims=True)
    some = high > low
    step = jnp.where(some, (high - low) / (2**bits - 1), 1.0)
    return jnp.where(jnp.isfinite(low), low, 0.0), step


def _codes(x: Array, low: Array, step: Array, bits: int) -> Array:
    near = jnp.round((x.astype(jnp.float32) - low) / step)
    return jnp.clip(near, 0, 2**bits - 1).astype(jnp.uint8)
