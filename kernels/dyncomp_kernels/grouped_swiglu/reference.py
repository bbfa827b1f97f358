"""The definition, in plain jnp: three grouped products by their definition, and the activation between them."""

import jax
from jax import Array

from dyncomp_kernels.grouped_matmul import reference


def grouped_swiglu(rows: Array, gate: Array, up: Array, down: Array, group_sizes: Array) -> Array:
    """See `dyncomp_kernels.grouped_swiglu.api.grouped_swiglu`; work is e times the ideal."""
    product = lambda x, w: reference.grouped_matmul(x, w, group_sizes)
    return product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)
