"""The definition, in plain jnp: every group multiplies all rows, and each row keeps its own group's product."""

import jax.numpy as jnp
from jax import Array

from dyncomp_kernels._widths import sum_dtype


def grouped_matmul(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """See `dyncomp_kernels.grouped_matmul.api.grouped_matmul`; work is e times the ideal."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])[:, None]
    member = (index < ends[None, :]) & (index >= (ends - group_sizes)[None, :])
    wide = sum_dtype(rows.dtype)
    products = jnp.einsum("mk,ekn->men", rows, weights, preferred_element_type=wide)
    return jnp.einsum("men,me->mn", products, member.astype(wide)).astype(rows.dtype)
