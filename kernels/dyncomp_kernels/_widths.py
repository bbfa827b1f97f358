"""In which dtype sums are taken: the one rule of all forms and of the library above."""

from typing import Any

import jax.numpy as jnp


def sum_dtype(dtype: Any) -> jnp.dtype:
    """Float32, or float64 where ``dtype`` is: nothing is summed in less than it holds."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
