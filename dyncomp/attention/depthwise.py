"""A depthwise convolution over a grid of tokens: a position signal, or local detail beside attention."""

import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

Grid = tuple[int, int] | None
LARGE, FEW = 7, 256
"""From this side of a kernel, and up to so many places of a grid, matrices serve on the CPU."""


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
    times longer for the former. Of a large kernel on a small grid there would be too many copies: such a channel is
    multiplied with a matrix from places to places.
    """
    small = kernel.shape[0] >= LARGE and x.shape[1] * x.shape[2] <= FEW
    on_cpu = _multiplied if small else _shifted
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=_convolved)


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


def _multiplied(x: Array, kernel: Array) -> Array:
    b, rows, columns, d = x.shape
    ones = [_reach(length, kernel.shape[0]).astype(kernel.dtype) for length in (rows, columns)]
    weights = jnp.einsum("yik,xjl,kld->dyxij", *map(jnp.asarray, ones), kernel)
    weights = weights.reshape(d, rows * columns, rows * columns)
    y = jnp.einsum("dpq,bqd->bpd", weights, x.reshape(b, rows * columns, d))
    return y.reshape(x.shape)


def _reach(length: int, size: int) -> np.ndarray:
    """[out, in, tap]: 1 where the tap of a kernel at ``out`` lies on ``in``."""
    out, place, tap = np.ogrid[:length, :length, :size]
    return (place - out == tap - size // 2).astype(np.float32)
