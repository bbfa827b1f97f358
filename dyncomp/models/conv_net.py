"""A convolutional backbone in blocks after which the network may end (VGG's or ResNet's kind of unit)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Float
from dyncomp.models.norm import Norm, NormKind
from dyncomp.models.vit import Head

Unit = Literal["plain", "residual"]
Halving = Literal["stride", "pool"]
MAP = ("batch", None, None, "embed")
"""Logical axes of a map [b h w d]."""


class Conv(nn.Module):
    """A convolution with zeros around the map, a bias, and perhaps a norm over channels.

    Attributes:
      width: output channels.
      size: side of the kernel, odd.
      stride: 2 halves rows and columns, rounded up.
      norm: None for none.
    """

    width: int
    size: int = 3
    stride: int = 1
    norm: NormKind | None = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b _ _ o"]:
        """Maps [b h w d] to [b h/stride w/stride o]."""
        shape, dtype = (self.size, self.size, x.shape[-1], self.width), self.dtypes.param
        axes = (None, None, None, "embed")
        kernel = param(self, "kernel", nn.initializers.he_normal(), shape, axes, dtype)
        bias = param(self, "bias", nn.initializers.zeros_init(), shape[3:], ("embed",), dtype)
        around = (self.size // 2, self.size // 2)
        y = lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (self.stride, self.stride),
            (around, around),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y + bias.astype(x.dtype)[None, None, None]
        return y if self.norm is None else Norm(self.norm, self.eps, self.dtypes, name="norm")(y)


class ConvUnits(nn.Module):
    """Units one after another on one resolution.

    A ``plain`` unit is relu(conv(x)); a ``residual`` one relu(x + conv(relu(conv(x)))), with a 1x1 convolution on the
    short path where width or resolution change.

    Attributes:
      widths: output channels of every unit.
      halve: how the block halves rows and columns before anything else: a stride of 2 in the first unit, a maximum
        over 2x2, or None for not at all.
    """

    widths: Sequence[int]
    unit: Unit = "plain"
    halve: Halving | None = None
    norm: NormKind | None = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b _ _ _"]:
        """Maps [b h w d] to [b h' w' d']."""
        if self.halve == "pool":
            x = max_pool(x)
        conv = functools.partial(Conv, norm=self.norm, eps=self.eps, dtypes=self.dtypes)
        for index, width in enumerate(self.widths):
            stride = 2 if self.halve == "stride" and index == 0 else 1
            y = conv(width, stride=stride, name=f"conv_{index}")(x)
            if self.unit == "residual":
                y = conv(width, name=f"second_{index}")(jax.nn.relu(y))
                if stride > 1 or x.shape[-1] != width:
                    x = conv(width, size=1, stride=stride, name=f"short_{index}")(x)
                y = x + y
            x = constrain(jax.nn.relu(y), MAP)
        return x

    def cost(self, rows: int, columns: int, inner: int) -> tuple[Cost, tuple[int, int, int]]:
        """Price of one map [rows columns inner], and the shape of what comes out.

        Products of convolutions and the comparisons of pooling; norms, biases and activations are not charged, as
        in the other backbones.
        """
        item, flops, moved = self.dtypes.compute_itemsize, 0, rows * columns * inner
        if self.halve == "pool":
            rows, columns = rows // 2, columns // 2
            flops += 3 * rows * columns * inner
        for index, width in enumerate(self.widths):
            short = inner != width
            if self.halve == "stride" and index == 0:
                rows, columns, short = -(-rows // 2), -(-columns // 2), True
            products = 9 * inner * width
            if self.unit == "residual":
                products += 9 * width * width + short * inner * width
            flops += 2 * rows * columns * products
            inner = width
        return Cost(flops, (moved + rows * columns * inner) * item), (rows, columns, inner)


class ConvNet(nn.Module):
    """Images to class logits; made of blocks that can be called one by one, as `ExitingClassifier` does.

    Norms are over channels, where the networks it is modelled on have batch norms: no running statistics, and examples
    stay independent. Weights of blocks have different shapes, so layers always run separately. Parameters: ``stem``
    (if any), ``block_i``, ``linear``.

    Attributes:
      classes: c.
      blocks: for every block the output channels of its units; there may be an exit after each.
      halved: blocks that begin by halving rows and columns.
      unit: see `ConvUnits`.
      halving: how ``halved`` blocks do it.
      stem: channels of a first 3x3 convolution; 0 for none.
    """

    classes: int
    blocks: Sequence[Sequence[int]]
    halved: Sequence[int] = ()
    unit: Unit = "plain"
    halving: Halving = "stride"
    stem: int = 0
    norm: NormKind | None = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        self.blocks = tuple(tuple(widths) for widths in self.blocks)
        self.halved = tuple(self.halved)
        if not self.blocks or not all(self.blocks):
            raise DyncompError("ConvNet.blocks: give at least one block of at least one unit")
        if not set(self.halved) <= set(range(len(self.blocks))):
            raise DyncompError(f"ConvNet.halved={self.halved}: use blocks 0..{self.depth - 1}")
        if self.unit not in ("plain", "residual"):
            raise DyncompError(f"ConvNet.unit={self.unit!r}: use 'plain' or 'residual'")
        if self.halving not in ("stride", "pool"):
            raise DyncompError(f"ConvNet.halving={self.halving!r}: use 'stride' or 'pool'")
        super().__post_init__()

    def setup(self):  # noqa: D102
        if self.stem:
            self.stem_conv = Conv(
                self.stem, norm=self.norm, eps=self.eps, dtypes=self.dtypes, name="stem"
            )
        self.block = self._blocks()
        self.linear = Head(self.classes, self.dtypes)

    def _blocks(self, **kwargs: Any) -> list[ConvUnits]:
        make = functools.partial(
            ConvUnits, unit=self.unit, norm=self.norm, eps=self.eps, dtypes=self.dtypes, **kwargs
        )
        halve: list[Halving | None] = [None] * self.depth
        for index in self.halved:
            halve[index] = self.halving
        return [make(widths, halve=halve[i]) for i, widths in enumerate(self.blocks)]

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b c"], Aux]:
        """Class logits, float32; arguments as in `VisionTransformer`, nothing can be captured."""
        maps, aux = self.features(images, mask, train)
        return self.head(maps[-1]), aux

    def features(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
    ) -> tuple[tuple[Float[Array, "b _ _ _"], ...], Aux]:
        """The map after every block (what exits look at); their shapes differ, see `exit_shapes`."""
        x, maps = self.embed(images), []
        for index in range(self.depth):
            x, _ = self.run_block(index, x)
            maps.append(x)
        b = images.shape[0]
        seen = {"images": count(b if mask is None else jnp.sum(mask > 0, dtype=jnp.int32), b)}
        parts = ("embed", *(f"block_{index}" for index in range(self.depth)), "head")
        return tuple(maps), Aux(events=dict.fromkeys(parts, seen))

    def embed(self, images: Float[Array | np.ndarray, "b h w _"]) -> Float[Array, "b h w _"]:
        """The stem, or the images as they are, in the compute dtype."""
        x = jnp.asarray(images).astype(self.dtypes.compute)
        return jax.nn.relu(self.stem_conv(x)) if self.stem else x

    def run_block(
        self, index: int, x: Float[Array, "b _ _ _"]
    ) -> tuple[Float[Array, "b _ _ _"], Aux]:
        """Block ``index`` alone: a middle segment."""
        return self.block[index](x), Aux()

    def pooled(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b _ _ _"]:
        """What an exit reads of a block's output: all of it, exits reduce maps themselves."""
        return x

    def head(self, x: Float[Array, "b _ _ d"]) -> Float[Array, "b c"]:
        """Mean over places, then linear: the final classifier."""
        mean = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return self.linear(mean.astype(x.dtype))

    def classify(self, x: Float[Array, "b _ _ d"]) -> Float[Array, "b c"]:
        """The last segment, on the last block's output."""
        return self.head(self.pooled(x))

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Channels of the last block; others differ, see `exit_shapes`."""
        return self.blocks[-1][-1]

    @property
    def layers(self) -> str:
        """Weights of layers are always apart."""
        return "unroll"

    @staticmethod
    def weights_of(params: Mapping[str, Any], index: int | None) -> dict[str, Any]:
        """The parameters that block ``index`` (with the final classifier) uses; None: those of `embed`."""
        used = ("stem",) if index is None else (f"block_{index}", "linear")
        return {name: params[name] for name in used if name in params}

    def exit_shapes(self, inputs_shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Rows, columns and channels after every block, for images [b h w c]."""
        return [shape for _, shape in self._walk(inputs_shape)]

    def block_prices(self, inputs_shape: tuple[int, ...]) -> list[Cost]:
        """Price of every block on one image."""
        return [price for price, _ in self._walk(inputs_shape)]

    def _walk(self, inputs_shape: tuple[int, ...]) -> list[tuple[Cost, tuple[int, int, int]]]:
        _, h, w, c = inputs_shape
        shape, found = (h, w, self.stem or c), []
        for block in self._blocks(parent=None):
            price, shape = block.cost(*shape)
            found.append((price, shape))
        return found

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices of all events for images [b h w c]."""
        _, h, w, c = inputs_shape
        item = self.dtypes.compute_itemsize
        stem = 2 * h * w * 9 * c * self.stem
        found = {"embed": {"images": Cost(stem, h * w * (4 * c + self.stem * item))}}
        for index, price in enumerate(self.block_prices(inputs_shape)):
            found[f"block_{index}"] = {"images": price}
        rows, columns, d = self.exit_shapes(inputs_shape)[-1]
        head = Cost(rows * columns * d + 2 * d * self.classes, d * item + self.classes * 4)
        return {**found, "head": {"images": head}}


def max_pool(x: Float[Array, "b h w d"]) -> Float[Array, "b _ _ d"]:
    """The maximum over 2x2 places; an odd last row or column is dropped."""
    b, h, w, d = x.shape
    windows = x[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, d)
    return jnp.max(windows, axis=(2, 4))
