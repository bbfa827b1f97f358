"""How near the states of a path through some layers come to those of the path through all."""

import jax.numpy as jnp

from dyncomp.core.typing import Array, Float


def path_similarity(
    short: Float[Array, "l b t d"], full: Float[Array, "l b t d"], mask: Array | None = None
) -> Float[Array, ""]:
    """Mean cosine of two paths' hidden states, float32, over layers and real positions; 0 if there are none.

    An optional term of Unified Layer Skipping (the code of arXiv 2404.06954, weight -0 there): states after each layer
    that both paths run. Gradients reach both.

    Args:
      short, full: states of the two paths after the same layers.
      mask: [b t], 1 for real positions.
    """
    a, b = short.astype(jnp.float32), full.astype(jnp.float32)
    norms = jnp.sum(a * a, -1) * jnp.sum(b * b, -1)
    cosine = jnp.sum(a * b, -1) / jnp.sqrt(jnp.maximum(norms, 1e-24))
    real = jnp.ones(a.shape[1:3], jnp.float32) if mask is None else mask.astype(jnp.float32)
    return jnp.sum(cosine * real[None]) / jnp.maximum(jnp.sum(real) * a.shape[0], 1.0)
