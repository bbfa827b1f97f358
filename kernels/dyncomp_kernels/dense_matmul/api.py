"""Rows times one matrix, in the form that each platform runs fast.

Accelerators need no help. XLA's CPU compiler does, and how a matrix lies in memory matters to it:

- One row streams through float32 weights of any layout, through bfloat16 weights only where they lie transposed
  ([n k]) and the sums are float32; else a plain loop runs, at a fraction of the memory's speed.
- A few rows (2 to `FEW`) run faster in float32 with transposed weights on the left, [n k] x [k rows], than with the
  rows on the left; in bfloat16 transposed weights fall back to the plain loop unless they are there. Only who lays
  weights out transposed asks for it: by ``transposed=True``, or `weights_transposed` around the code that calls.
- Many rows: the order does not matter; bfloat16 wants float32 sums.

Rounding float32 sums at the end is what the plain bfloat16 loop does, too. ``python -m
dyncomp_kernels.dense_matmul.bench`` prints the rates.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._widths import sum_dtype

FEW = 64
"""Up to how many rows transposed weights go to the left."""

_TRANSPOSED = contextvars.ContextVar("dense_matmul_transposed", default=False)


@contextlib.contextmanager
def weights_transposed() -> Iterator[None]:
    """While tracing inside, `dense_matmul` takes weights for views of matrices that lie as [n k]."""
    token = _TRANSPOSED.set(True)
    try:
        yield
    finally:
        _TRANSPOSED.reset(token)


def dense_matmul(
    rows: Array,
    weights: Array,
    axes: int = 1,
    *,
    transposed: bool | None = None,
    dtype: Any = None,
) -> Array:
    """Contracts the last ``axes`` axes of ``rows`` with the first of ``weights``: [... k] x [k n] -> [... n].

    Args:
      rows: [... k] (or [... k1 k2] with two axes), float32 or bfloat16.
      weights: [k ...], same dtype; heads may be an axis of their own.
      axes: how many are contracted.
      transposed: whether ``weights`` is the transpose of an array in memory. It changes the speed on CPUs, not the
        value; by default as `weights_transposed` says.
      dtype: of the result; default that of ``rows``.

    Returns:
      [... n], accumulated in `sum_dtype`.

    Raises:
      ValueError: the inner sizes or the dtypes differ.
    """
    if rows.shape[rows.ndim - axes :] != weights.shape[:axes] or rows.dtype != weights.dtype:
        raise ValueError(
            f"dense_matmul: rows {rows.dtype}{list(rows.shape)} and weights {weights.dtype}{list(weights.shape)} do not"
            " fit; give [... k] and [k ...] of one dtype"
        )
    dtype = rows.dtype if dtype is None else jnp.dtype(dtype)
    wider = None if dtype == rows.dtype else dtype
    plain = functools.partial(jnp.tensordot, axes=axes, preferred_element_type=wider)
    few = 1 < math.prod(rows.shape[: rows.ndim - axes]) <= FEW
    left = few and (_TRANSPOSED.get() if transposed is None else transposed)
    if rows.dtype != jnp.bfloat16 and not left:
        return plain(rows, weights)
    summed = functools.partial(_summed, axes=axes, left=left, dtype=dtype)
    return lax.platform_dependent(rows, weights, cpu=summed, default=plain)


def _summed(rows: Array, weights: Array, axes: int, left: bool, dtype: Any) -> Array:
    """With one inner and one outer axis, and sums in `sum_dtype`; the weights on the left, or the rows."""
    outer, inner = rows.shape[: rows.ndim - axes], math.prod(weights.shape[:axes])
    x, w = rows.reshape(-1, inner), weights.reshape(inner, -1)
    wide = sum_dtype(rows.dtype)
    if left:
        # Without the barrier XLA turns the product round. Rows turned by hand would make a plain loop of bfloat16.
        last = (((1,), (1,)), ((), ()))
        product = lax.dot_general(w.T, x, last, preferred_element_type=wide)
        product = lax.optimization_barrier(product).T
    else:
        product = jnp.matmul(x, w, preferred_element_type=wide)
    return product.reshape(*outer, *weights.shape[axes:]).astype(dtype)
