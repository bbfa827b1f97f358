"""Activations of few bits whose step is learned: what a spiking neuron's rate stands for."""

import functools

import jax
import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float


def top_level(bits: int) -> int:
    """2^bits - 1, the highest level; also the steps of time after which a rate has as many levels.

    Raises:
      DyncompError: fewer bits than 1.
    """
    if bits < 1:
        raise DyncompError(f"bits={bits}: use 1 or more")
    return 2**bits - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def learned_step(
    x: Float[Array, "b *n"], scale: Float[Array, ""], bits: int
) -> Float[Array, "b *n"]:
    """a = s clip(round(x / s), 0, 2^bits - 1), halves to even (LSQ, Esser et al. 2020, for activations that are >= 0).

    With z = x / s the gradient of x passes where 0 < z < 2^bits - 1. That of s is round(z) - z there, 2^bits - 1 above
    and 0 below, summed over all elements and divided by sqrt(b (2^bits - 1)). LSQ itself counts all elements there; the
    batch alone is what the released code of arXiv 2303.10276 counts.

    Args:
      x: b is the batch.
      scale: s > 0.
      bits: static.
    """
    return scale * jnp.clip(jnp.round(x / scale), 0, top_level(bits))


def _forward(x, scale, bits):
    return learned_step(x, scale, bits), (x, scale)


def _backward(bits, kept, g):
    x, scale = kept
    top, z = top_level(bits), x / scale
    inside = (z > 0) & (z < top)
    of_scale = jnp.where(inside, jnp.round(z) - z, jnp.where(z >= top, float(top), 0.0))
    total = jnp.sum((g * of_scale).astype(jnp.float32)) / (x.shape[0] * top) ** 0.5
    return jnp.where(inside, g, jnp.zeros_like(g)), total.astype(scale.dtype)


learned_step.defvjp(_forward, _backward)
