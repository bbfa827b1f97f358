"""A product with a bias, for the small ends of networks."""

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

LECUN = nn.initializers.lecun_normal()


class Dense(nn.Module):
    """W x + b over the last axis, in ``x.dtype``.

    Attributes:
      width: of the result.
      bias: whether there is one.
    """

    width: int
    bias: bool = True
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n o"]:
        """Every row."""
        shape, dtype = (x.shape[-1], self.width), self.dtypes.param
        y = x @ param(self, "kernel", LECUN, shape, ("embed", None), dtype).astype(x.dtype)
        if not self.bias:
            return y
        zeros = nn.initializers.zeros_init()
        bias = param(self, "bias", zeros, shape[1:], (None,), dtype).astype(x.dtype)
        return y + jnp.broadcast_to(bias, y.shape)
