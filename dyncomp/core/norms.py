"""Normalisation as pure functions (statistics in float32 or more under every dtype policy).

Squares are products: the derivative of ``jnp.square(x)`` keeps ``2 x`` for the backward pass, a copy of every
activation, while that of ``x * x`` keeps the x that is kept anyway.
"""

import jax.numpy as jnp
from jax import lax

from dyncomp.core.dtypes import widened
from dyncomp.core.typing import Array, Float


def rms_norm(
    x: Float[Array, "*n d"], scale: Float[Array, "d"], *, eps: float = 1e-6
) -> Float[Array, "*n d"]:
    """Root-mean-square norm (Zhang and Sennrich 2019, eq. 4); returns ``x.dtype``."""
    wide = widened(x)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + wide.dtype.type(eps))
    scale = jnp.expand_dims(scale.astype(wide.dtype), tuple(range(x.ndim - 1)))
    return (wide * inverse * scale).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*n d"],
    scale: Float[Array, "d"],
    bias: Float[Array, "d"],
    *,
    eps: float = 1e-6,
) -> Float[Array, "*n d"]:
    """Layer norm (Ba et al. 2016); returns ``x.dtype``."""
    wide = widened(x)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + wide.dtype.type(eps))
    lead = tuple(range(x.ndim - 1))
    scale = jnp.expand_dims(scale.astype(wide.dtype), lead)
    bias = jnp.expand_dims(bias.astype(wide.dtype), lead)
    return (centred * inverse * scale + bias).astype(x.dtype)
