"""How unsure a next-token distribution is."""

import math

import jax
import jax.numpy as jnp

from dyncomp.core.typing import Array, Float


def entropy_bits(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """Entropy of softmax(logits) in bits, float32, in [0, log2 v].

    For raw logits, before temperature and filters (arXiv 2502.06833). Tokens at -inf count as impossible; every row
    needs a finite logit. Adding a constant to a row changes nothing (to rounding).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    possible = log_p > -jnp.inf
    terms = jnp.where(possible, jnp.exp(log_p) * jnp.where(possible, log_p, 0.0), 0.0)
    bits = -jnp.sum(terms, axis=-1) / math.log(2.0)
    return jnp.clip(bits, 0.0, math.log2(logits.shape[-1]))
