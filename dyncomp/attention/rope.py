"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama."""

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int


def rope_angles(
    positions: Int[Array, "*n"], head_dim: int, theta: float = 10_000.0
) -> Float[Array, "*n q"]:
    """Rotation angles ``position * theta^(-2i/p)`` of the p/2 pairs of a head, float32, radians.

    Raises:
      DyncompError: ``head_dim`` is odd.
    """
    if head_dim % 2:
        raise DyncompError(
            f"RoPE rotates pairs: head_dim={head_dim} is odd; choose an even head_dim"
        )
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
    frequency = jnp.float32(theta) ** -exponent
    return jnp.expand_dims(positions.astype(jnp.float32), -1) * jnp.expand_dims(
        frequency, tuple(range(positions.ndim))
    )


def rotate(x: Float[Array, "b t h p"], angles: Float[Array, "#b t q"]) -> Float[Array, "b t h p"]:
    """Rotates element i with element i + p/2 of each head by ``angles``; float32 inside, returns ``x.dtype``."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
