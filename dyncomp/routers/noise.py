"""Noise on routers' inputs and logits, drawn while training only."""

import jax
import jax.numpy as jnp

from dyncomp.core.typing import Array, Float, Key


def jitter(key: Key[Array, ""], x: Float[Array, "n d"], amount: float) -> Float[Array, "n d"]:
    """x times uniform noise in [1 - amount, 1 + amount] (Fedus et al. 2021, sec. 2.4)."""
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - amount, 1 + amount)


def add(
    key: Key[Array, ""], logits: Float[Array, "n e"], std: Float[Array, "#n #e"]
) -> Float[Array, "n e"]:
    """Logits plus normal noise of the given standard deviation (Shazeer et al. 2017, eq. 4)."""
    return logits + std * jax.random.normal(key, logits.shape, logits.dtype)


def unit_scale(logits: Float[Array, "n e"], std: float) -> Float[Array, "n e"]:
    """Logits of each row rescaled to a standard deviation over experts (unbiased estimator, as MoE++'s code has it)."""
    spread = jnp.std(logits, axis=-1, keepdims=True, ddof=1)
    return logits * (std / jnp.maximum(spread, 1e-9))
