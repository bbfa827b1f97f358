"""Dense attention as one kernel of cuDNN, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from dyncomp.attention.sight import Sight
from dyncomp.core.typing import Array, Float

FLOATS = (jnp.bfloat16, jnp.float16)
WIDTHS = (8, 128)
"""A head's width is a multiple of the first, and at most the second."""


def fused_serves(q: Array, sight: Sight, real: Array | None) -> bool:
    """Whether cuDNN can do it: 16-bit numbers, no padding mask, no window, no tree; a GPU is the default device."""
    plain = real is None and sight.window is None and sight.visible is None
    multiple, most = WIDTHS
    fits = q.shape[-1] % multiple == 0 and q.shape[-1] <= most and q.dtype in FLOATS
    return plain and fits and jax.default_backend() == "gpu"


def fused_attention(
    q: Float[Array, "b t h p"], k: Float[Array, "b t g p"], v: Float[Array, "b t g p"], causal: bool
) -> Float[Array, "b t h p"]:
    """`attend` without a table of scores, in either direction (Dao et al. 2022), by `jax.nn`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
