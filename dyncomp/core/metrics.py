"""Mergeable metrics: sums and counts, never means of means."""

import jax.numpy as jnp
import numpy as np
from flax import struct

from dyncomp.core.dtypes import widened
from dyncomp.core.typing import Array, Bool, Float

Floats = Float[Array | np.ndarray, "..."]
Bools = Bool[Array | np.ndarray, "..."]


@struct.dataclass
class Mean:
    """A mean as a pair of sums that merges exactly over steps, devices and hosts."""

    total: Floats | float  # numpy once fetched, float64 where the host adds up
    count: Floats | float

    @classmethod
    def of(cls, values: Floats | Bools, weights: Floats | None = None) -> "Mean":
        """Weighted sum over all elements of ``values`` (float32 or more; True counts 1)."""
        values = widened(jnp.asarray(values))
        weights = jnp.ones_like(values) if weights is None else weights.astype(values.dtype)
        return cls(jnp.sum(values * weights), jnp.sum(jnp.broadcast_to(weights, values.shape)))

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both sets of elements."""
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        """The mean as a Python float; NaN when nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")
