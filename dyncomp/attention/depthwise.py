"""A depthwise convolution over a grid of tokens: a position signal, or local detail beside attention."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

Grid = tuple[int, int] | None


def grid_of(grid: Grid, tokens: int) -> tuple[int, int]:
    """Rows and columns of a sequence; None stands for a square.

    Raises:
      DyncompError: the grid has another number of tokens.
    """
    side = math.isqrt(tokens)
    rows, columns = grid or (side, side)
    if rows * columns != tokens:
        fix = "set grid=(rows, columns)" if grid is None else f"{rows}x{columns} does not fit"
        raise DyncompError(f"grid={grid}: {tokens} tokens are no such grid; {fix}")
    return rows, columns


class DepthwiseConv(nn.Module):
    """Every channel is convolved with a kernel of its own over the whole grid, zeros around it, plus a bias.

    Attributes:
      size: side of the kernel, odd.
      grid: rows and columns of the tokens, in row-major order; None for a square.
    """

    size: int
    grid: Grid = None
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """The convolution alone, without a residual."""
        if self.size < 1 or self.size % 2 == 0:
            raise DyncompError(f"DepthwiseConv.size={self.size}: use an odd number")
        (b, t, d), dtype = x.shape, self.dtypes.param
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=()
        )
        axes = (None, None, "embed")
        kernel = param(self, "kernel", init, (self.size, self.size, d), axes, dtype)
        bias = param(self, "bias", nn.initializers.zeros_init(), (d,), ("embed",), dtype)
        grid = x.reshape(b, *grid_of(self.grid, t), d)
        y = depthwise(grid, kernel.astype(x.dtype)).reshape(b, t, d)
        return y + bias.astype(x.dtype)[None, None]

    def cost(self, d_model: int) -> Cost:
        """Price of one token."""
        return Cost(2 * self.size**2 * d_model, 2 * d_model * self.dtypes.compute_itemsize)


def depthwise(
    x: Float[Array, "b rows columns d"], kernel: Float[Array, "size size d"]
) -> Float[Array, "b rows columns d"]:
    """Cross-correlation of every channel with its kernel, zeros around the grid.

    A grouped convolution; on the CPU a sum of shifted copies, which fuse into one loop: there XLA takes some fifteen
    times longer for the former.
    """
    return lax.platform_dependent(x, kernel, cpu=_shifted, default=_convolved)


def _convolved(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _shifted(x: Array, kernel: Array) -> Array:
    size, pad = kernel.shape[0], kernel.shape[0] // 2
    wide = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows, columns = x.shape[1:3]
    total = jnp.zeros_like(x)
    for i in range(size):
        for j in range(size):
            shifted = wide[:, i : i + rows, j : j + columns]
            total = total + shifted * kernel[i, j][None, None, None]
    return total
