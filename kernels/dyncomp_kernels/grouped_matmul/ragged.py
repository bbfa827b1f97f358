"""The form of jax itself: on TPU native for the products by group (the ideal FLOPs with the libtpu that jax pins).

Its weight gradient is compiled densely there, and all of it on other platforms: as many times the ideal FLOPs as there
are groups.
"""

import jax.numpy as jnp
from jax import Array, lax


def forward(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """rows [m k] x weights [e k n] by group -> [m n]; rows past the last group give zeros."""
    product = lax.ragged_dot(rows, weights, group_sizes, preferred_element_type=jnp.float32)
    used = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(used, product, 0).astype(rows.dtype)


def row_gradient(cotangent: Array, weights: Array, group_sizes: Array) -> Array:
    """cotangent [m n] x weights [e k n] transposed, by group -> [m k]."""
    return forward(cotangent, weights.transpose(0, 2, 1), group_sizes)


def weight_gradient(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sum over each group's rows of rows^T cotangent: [m k], [m n] -> [e k n], float32."""
    contract = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(
        rows, cotangent, group_sizes, contract, preferred_element_type=jnp.float32
    )
