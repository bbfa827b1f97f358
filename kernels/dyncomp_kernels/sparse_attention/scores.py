"""What the Pallas forms make of a tile of scores: products, which pairs are seen, numbers that stand for none."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels.sparse_attention.layout import Layout

LOG2E = math.log2(math.e)
UNSEEN = float(jnp.finfo(jnp.float32).min)
"""The score of a pair that is not seen."""

LOW = -1e30
"""Top of a row that has seen nothing: its weights are 0, as an unseen score lies far below."""

NT, NN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))


def dot(a: Array, b: Array, dims: Any) -> Array:
    """A product of two matrices, float32; factors in float32 are multiplied as such."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def masked(scores: Array, size: Layout, places: tuple[Array, Array], real: Array | None) -> Array:
    """Scores with `UNSEEN` where a query does not see a key.

    Args:
      scores: float32 [n k], or [k n].
      places: of the queries and of the keys, int32; they broadcast against each other.
      real: which keys are no padding, broadcasts likewise; None for all.
    """
    place, key = places
    rule, seen = size.seeing, key < size.s
    if real is not None:
        seen = seen & real
    if rule.causal:
        seen = seen & (key <= place)
    if rule.window is not None:
        seen = seen & ((key > place - rule.window) | (key < rule.sink))
    return jnp.where(seen, scores, UNSEEN)
