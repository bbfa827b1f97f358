"""Rows times one matrix, in the form that each platform runs fast.

Accelerators and float32 need no help. XLA's CPU compiler runs a bfloat16 product that gives bfloat16 by a plain loop,
at a fraction of the memory's speed. One that gives float32 goes to a library for two rows and more, and to a streaming
loop for one row and weights that lie transposed in memory ([n k]). Rounding the float32 sums at the end is what the
plain loop does, too. ``python -m dyncomp_kernels.dense_matmul.bench`` prints the rates.
"""

import functools
import math

import jax.numpy as jnp
from jax import Array, lax


def dense_matmul(rows: Array, weights: Array, axes: int = 1) -> Array:
    """Contracts the last ``axes`` axes of ``rows`` with the first of ``weights``: [... k] x [k n] -> [... n].

    Args:
      rows: [... k] (or [... k1 k2] with two axes), float32 or bfloat16.
      weights: [k ...], same dtype; heads may be an axis of their own.
      axes: how many are contracted.

    Returns:
      [... n] in the dtype of ``rows``, accumulated in float32.

    Raises:
      ValueError: the inner sizes or the dtypes differ.
    """
    if rows.shape[rows.ndim - axes :] != weights.shape[:axes] or rows.dtype != weights.dtype:
        raise ValueError(
            f"dense_matmul: rows {rows.dtype}{list(rows.shape)} and weights {weights.dtype}{list(weights.shape)} do not"
            " fit; give [... k] and [k ...] of one dtype"
        )
    plain = functools.partial(jnp.tensordot, axes=axes)
    if rows.dtype != jnp.bfloat16:
        return plain(rows, weights)
    summed = functools.partial(_summed, axes=axes)
    return lax.platform_dependent(rows, weights, cpu=summed, default=plain)


def _summed(rows: Array, weights: Array, axes: int) -> Array:
    """With one inner and one outer axis, and float32 sums."""
    outer, inner = rows.shape[: rows.ndim - axes], math.prod(weights.shape[:axes])
    product = jnp.matmul(
        rows.reshape(*outer, inner),
        weights.reshape(inner, math.prod(weights.shape[axes:])),
        preferred_element_type=jnp.float32,
    )
    return product.reshape(*outer, *weights.shape[axes:]).astype(rows.dtype)
