"""Stages of a convolutional network of bottleneck blocks (RegNet, Radosavovic et al. 2020, arXiv 2003.13678)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Float
from dyncomp.models.batch_norm import BatchNorm
from dyncomp.models.dense import Dense

Size = tuple[int, int, int]
"""Rows, columns and channels of a feature map."""
MAP = ("batch", None, None, "embed")
KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvLevel:
    """Blocks that share a resolution and a width.

    Attributes:
      width: channels.
      blocks: how many.
      stride: of the first block.
      group_width: channels of a group of the 3x3 convolutions; 0 for one group.
      squeeze: whether blocks weigh their channels (the Y of RegNetY, squeeze and excitation to a quarter).
    """

    width: int
    blocks: int = 1
    stride: int = 1
    group_width: int = 0
    squeeze: bool = False

    def __post_init__(self):
        if self.width < 1 or self.blocks < 1 or self.stride < 1 or self.group_width < 0:
            raise DyncompError(f"{self}: width, blocks and stride >= 1, group_width >= 0")
        if self.group_width and self.width % self.group_width:
            raise DyncompError(f"{self}: group_width must divide width")

    def size(self, size: Size) -> Size:
        """Of the feature map that leaves the level, from that which enters."""
        return -(-size[0] // self.stride), -(-size[1] // self.stride), self.width


class ConvNorm(nn.Module):
    """A convolution without bias, batch norm, perhaps ReLU; zeros around the grid.

    Attributes:
      width: channels out.
      size: side of the kernel, odd.
      groups: of channels.
    """

    width: int
    size: int = 3
    stride: int = 1
    groups: int = 1
    relu: bool = True
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ _"], train: bool = False) -> Float[Array, "b _ _ o"]:
        """Maps [b h w d] to [b h/stride w/stride width], rounded up."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.width)
        axes = (None, None, None, "embed")
        kernel = param(self, "kernel", KAIMING, shape, axes, self.dtypes.param).astype(x.dtype)
        y = lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            ((self.size // 2, self.size // 2),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        y = BatchNorm(dtypes=self.dtypes, name="norm")(y, train)
        return constrain(jax.nn.relu(y) if self.relu else y, MAP)

    def cost(self, size: Size) -> Cost:
        """Price of one map of that size (norms are free at inference: they fold into the kernel)."""
        h, w, inner = size
        out = -(-h // self.stride) * -(-w // self.stride) * self.width
        flops = 2 * self.size**2 * (inner // self.groups) * out
        return Cost(flops, (h * w * inner + out) * self.dtypes.compute_itemsize)


class SqueezeExcite(nn.Module):
    """Channels times a sigmoid of their means (Hu et al. 2018).

    Attributes:
      hidden: width between the two products.
    """

    hidden: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        """Weighs every channel of every map."""
        y = pooled(x)
        y = jax.nn.relu(Dense(self.hidden, dtypes=self.dtypes, name="down")(y))
        y = jax.nn.sigmoid(Dense(x.shape[-1], dtypes=self.dtypes, name="up")(y))
        return x * y[:, None, None]

    def cost(self, size: Size) -> Cost:
        """Price of one map: mean, two products, one multiplication a value."""
        h, w, d = size
        return Cost(2 * h * w * d + 4 * d * self.hidden, 2 * h * w * d)


class Bottleneck(nn.Module):
    """1x1, 3x3 (in groups), squeeze, 1x1, all of the level's width, around a shortcut; ReLU after the sum.

    Attributes:
      level: widths and options.
      first: whether it changes resolution and width; then the shortcut is a convolution.
    """

    level: ConvLevel
    first: bool
    dtypes: DTypes = DTypes()

    def _parts(self, inner: int, **kwargs: Any) -> dict[str, Any]:
        level, stride = self.level, self.level.stride if self.first else 1
        groups = level.width // level.group_width if level.group_width else 1
        own: dict[str, Any] = {"dtypes": self.dtypes, **kwargs}
        conv = functools.partial(ConvNorm, level.width, **own)
        parts: dict[str, Any] = {
            "reduce": conv(1, name="reduce"),
            "conv": conv(3, stride, groups, name="conv"),
            "expand": conv(1, relu=False, name="expand"),
        }
        if level.squeeze:  # of the width that enters the block, as RegNetY has it
            hidden = max(1, round(inner / 4))
            parts["squeeze"] = SqueezeExcite(hidden, name="squeeze", **own)
        if self.first and (stride != 1 or inner != level.width):
            parts["shortcut"] = conv(1, stride, relu=False, name="shortcut")
        return parts

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ _"], train: bool = False) -> Float[Array, "b _ _ o"]:
        """One block."""
        parts = self._parts(x.shape[-1])
        y = parts["conv"](parts["reduce"](x, train), train)
        y = parts["squeeze"](y) if "squeeze" in parts else y
        y = parts["expand"](y, train)
        return jax.nn.relu(y + (parts["shortcut"](x, train) if "shortcut" in parts else x))

    def cost(self, size: Size) -> Cost:
        """Price of one map of that size."""
        parts, out = self._parts(size[-1], parent=None), self.level.size(size)
        out = out if self.first else size
        middle = (*size[:2], self.level.width)
        at = {"reduce": size, "conv": middle, "squeeze": out, "expand": out, "shortcut": size}
        return sum((part.cost(at[name]) for name, part in parts.items()), Cost(0))


class ConvStage(nn.Module):
    """The blocks of a level."""

    level: ConvLevel
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ _"], train: bool = False) -> Float[Array, "b _ _ o"]:
        """Runs them in order."""
        for index in range(self.level.blocks):
            block = Bottleneck(self.level, index == 0, self.dtypes, name=f"block_{index}")
            x = block(x, train)
        return x

    def cost(self, size: Size) -> Cost:
        """Price of one map of that size, which enters."""
        total, make = Cost(0), lambda first: Bottleneck(self.level, first, self.dtypes, parent=None)
        for index in range(self.level.blocks):
            total = total + make(index == 0).cost(size)
            size = self.level.size(size) if index == 0 else size
        return total


def pooled(x: Float[Array, "b h w d"]) -> Float[Array, "b d"]:
    """The mean over the grid, in float32; ``x.dtype``."""
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype)


def bins(length: int, side: int) -> Float[np.ndarray, "side length"]:
    """Weights of an average over ``side`` bins: bin i covers floor(i length / side) to ceil((i + 1) length / side)."""
    out = np.zeros((side, length), np.float32)
    for index in range(side):
        start, stop = index * length // side, -(-(index + 1) * length // side)
        out[index, start:stop] = 1.0 / (stop - start)
    return out


def adaptive_pool(x: Float[Array, "b h w d"], side: int) -> Float[Array, "b side side d"]:
    """Means over side x side bins (`bins`), which overlap where the side does not divide the grid."""
    b, h, w, d = x.shape
    if (h, w) == (side, side):
        return x
    wide = x.astype(jnp.float32)
    if h % side == 0 and w % side == 0:
        cut = wide.reshape(b, side, h // side, side, w // side, d)
        return jnp.mean(cut, axis=(2, 4)).astype(x.dtype)
    rows, columns = jnp.asarray(bins(h, side)), jnp.asarray(bins(w, side))
    return jnp.einsum("ih,jw,bhwd->bijd", rows, columns, wide).astype(x.dtype)
