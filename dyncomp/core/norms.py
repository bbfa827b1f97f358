"""Normalisation as pure functions (float32 statistics under every dtype policy).

Squares are products: the derivative of ``jnp.square(x)`` keeps ``2 x`` for the backward pass, a copy of every
activation, while that of ``x * x`` keeps the x that is kept anyway.
"""

import jax.numpy as jnp
from jax import lax

from dyncomp.core.typing import Array, Float


def rms_norm(
    x: Float[Array, "*n d"], scale: Float[Array, "d"], *, eps: float = 1e-6
) -> Float[Array, "*n d"]:
    """Root-mean-square norm (Zhang and Sennrich 2019, eq. 4); returns ``x.dtype``."""
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(eps))
    scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
    return (wide * inverse * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*n d"],
    scale: Float[Array, "d"],
    bias: Float[Array, "d"],
    *,
    eps: float = 1e-6,
) -> Float[Array, "*n d"]:
    """Layer norm (Ba et al. 2016); returns ``x.dtype``."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + jnp.float32(eps))
    lead = tuple(range(x.ndim - 1))
    scale = jnp.expand_dims(scale.astype(jnp.float32), lead)
    bias = jnp.expand_dims(bias.astype(jnp.float32), lead)
    return (centred * inverse * scale + bias).astype(x.dtype)
