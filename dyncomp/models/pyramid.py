"""A vision backbone of levels: convolutions halve the grid between them, each has its own width and group of blocks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dyncomp.attention.depthwise import DepthwiseConv, Grid
from dyncomp.core.aux import Aux, count, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Float
from dyncomp.models.block import ACTIVATION, Block
from dyncomp.models.group import (
    Execution,
    Group,
    GroupStack,
    Remat,
    check_execution,
    first_below,
)
from dyncomp.models.norm import Norm, NormKind
from dyncomp.models.vit import Head


@dataclasses.dataclass(frozen=True)
class Level:
    """Blocks that share a resolution.

    Attributes:
      width: d of this level.
      group: its blocks.
    """

    width: int
    group: Group


class ConvBlock(Block):
    """A `Block` behind ``x + conv(x)``, a depthwise convolution that tells places apart (CPVT, arXiv 2102.10882).

    Attributes:
      conv: side of its kernel.
      grid: rows and columns of the tokens; None for a square.
    """

    conv: int = 3
    grid: Grid = None

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], *args: Any, **kwargs: Any) -> tuple[Array, Aux]:
        """As `Block`; tokens count under ``position``."""
        y = DepthwiseConv(self.conv, self.grid, self.dtypes, name="position")(x)
        x, aux = super().__call__(constrain(x + y, ACTIVATION), *args, **kwargs)
        tokens = {"tokens": count(x.shape[0] * x.shape[1])}
        return x, dataclasses.replace(aux, events={**aux.events, "position": tokens})

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """Those of `Block`, and a token of the convolution."""
        conv = DepthwiseConv(self.conv, dtypes=self.dtypes, parent=None)
        return {**super().cost(d_model, length), "position": {"tokens": conv.cost(d_model)}}


class HalvingConv(nn.Module):
    """A convolution 3x3 of stride 2 and a norm: half the rows and columns, another width.

    Attributes:
      width: of the output.
    """

    width: int
    norm: NormKind = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ _"]) -> Float[Array, "b _ _ o"]:
        """Images [b h w c] to [b h/2 w/2 o], rounded up."""
        dtype, inner = self.dtypes.param, x.shape[-1]
        init, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        axes = (None, None, None, "embed")
        kernel = param(self, "kernel", init, (3, 3, inner, self.width), axes, dtype)
        bias = param(self, "bias", zeros, (self.width,), ("embed",), dtype)
        y = lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y + bias.astype(x.dtype)[None, None, None]
        return Norm(self.norm, self.eps, self.dtypes, name="norm")(y)


class Pyramid(nn.Module):
    """Images to class logits through levels of falling resolution: BiFormer's layout (arXiv 2303.08810, sec. 3.3).

    The stem halves the image twice, and a convolution halves the grid between levels. Norms stand where the released
    code has batch norms (stem, between levels, head): no running statistics. Mixers are told the grid by nothing but
    their own ``grid``; None suits square images.

    Attributes:
      classes: c.
      levels: from fine to coarse.
      layers, remat: as in `DecoderLM`.
    """

    classes: int
    levels: Sequence[Level]
    layers: Execution = "scan"
    remat: Remat = "none"
    norm: NormKind = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_execution(self.layers, self.remat)
        self.levels = tuple(self.levels)
        if not self.levels:
            raise DyncompError("Pyramid.levels is empty: give at least one Level")
        super().__post_init__()

    def setup(self):  # noqa: D102
        first = self.levels[0].width
        self.stem = [self._halving(first // 2), self._halving(first)]
        self.down = [self._halving(level.width) for level in self.levels[1:]]
        self.group = self._stacks()
        self.final_norm = Norm(self.norm, self.eps, self.dtypes)
        self.head = Head(self.classes, self.dtypes)

    def _halving(self, width: int) -> HalvingConv:
        return HalvingConv(width, self.norm, self.eps, self.dtypes)

    def _stacks(self, **kwargs: Any) -> list[GroupStack]:
        return [
            GroupStack(level.group, self.layers, self.remat, self.dtypes, **kwargs)
            for level in self.levels
        ]

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b c"], Aux]:
        """Class logits, float32; arguments as in `VisionTransformer`."""
        b = images.shape[0]
        real = b if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
        seen = Aux(events={"images": count(real, b)})
        x = self.stem[0](jnp.asarray(images).astype(self.dtypes.compute))
        x, parts = self.stem[1](jax.nn.gelu(x)), {"stem": seen}
        for index, (stack, bare) in enumerate(
            zip(self.group, self._stacks(parent=None), strict=True)
        ):
            if index:
                x, parts[f"down_{index - 1}"] = self.down[index - 1](x), seen
            rows, columns, d = x.shape[1:]
            tokens = x.reshape(b, rows * columns, d)
            below = first_below([bare], b, rows * columns)
            own = None if mask is None else jnp.broadcast_to(mask[:, None], tokens.shape[:2])
            tokens, aux = stack(tokens, None, own, None, train, capture, below)
            parts[f"group_{index}"] = dataclasses.replace(aux, below={})
            x = tokens.reshape(b, rows, columns, d)
        parts["head"] = seen
        pooled = jnp.mean(self.final_norm(x).astype(jnp.float32), axis=(1, 2))
        return self.head(pooled.astype(x.dtype)), nest(**parts)

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices of all events for images [b h w c]."""
        _, h, w, c = inputs_shape
        item, first, found = self.dtypes.compute_itemsize, self.levels[0].width, {}

        def halved(rows: int, columns: int, inner: int, outer: int) -> tuple[int, int, Cost]:
            tokens = -(-rows // 2), -(-columns // 2)
            work = 2 * tokens[0] * tokens[1] * 9 * inner * outer
            return *tokens, Cost(work, (rows * columns * inner) * item)

        h, w, one = halved(h, w, c, first // 2)
        h, w, two = halved(h, w, first // 2, first)
        found["stem"], d = {"images": one + two}, first
        for index, (level, stack) in enumerate(
            zip(self.levels, self._stacks(parent=None), strict=True)
        ):
            if index:
                h, w, price = halved(h, w, d, level.width)
                found[f"down_{index - 1}"], d = {"images": price}, level.width
            found[f"group_{index}"] = stack.cost(d, h * w)
        head = Cost(2 * d * self.classes, d * item + self.classes * 4)
        return {**found, "head": {"images": head}}
