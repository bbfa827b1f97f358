"""U-ViT (Bao et al. 2023): a transformer that predicts noise, with long skips from early to late blocks."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.diffusion.schedules import time_embedding
from dyncomp.models.block import ACTIVATION, Block
from dyncomp.models.group import Execution, Group, GroupStack, Remat, check_execution
from dyncomp.models.norm import Norm
from dyncomp.models.single_blocks import block_outputs
from dyncomp.models.vit import patches

LECUN, ZEROS = nn.initializers.lecun_normal(), nn.initializers.zeros_init()


class SkipBlock(nn.Module):
    """A block on W [x, skip] + b; the skip comes where a cache would: ``{"skip": [b t d]}``.

    Attributes:
      block: factory of the block behind it.
    """

    block: Factory = Block
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.block, "SkipBlock.block")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Any = None,
        mask: Array | None = None,
        cache: Mapping[str, Any] | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Runs the block; its side results and ``skip``, whose event ``tokens`` is a row of the product.

        Raises:
          DyncompError: no skip.
        """
        if cache is None:
            raise DyncompError("SkipBlock: give the skip as cache={'skip': [b t d]}")
        both = jnp.concatenate([x, cache["skip"].astype(x.dtype)], axis=-1)
        d, dtype = x.shape[-1], self.dtypes.param
        kernel = param(self, "kernel", LECUN, (2 * d, d), (None, "embed"), dtype)
        bias = param(self, "bias", ZEROS, (d,), ("embed",), dtype)
        x = constrain(both @ kernel.astype(x.dtype) + bias.astype(x.dtype)[None, None], ACTIVATION)
        block = self.block(name="block", dtypes=self.dtypes)
        x, aux = block(x, positions, mask, None, train=train, capture=capture)
        rows = x.shape[0] * x.shape[1]
        events = {**aux.events, "skip": {"tokens": count(rows)}}
        return x, dataclasses.replace(aux, events=events)

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """The block's prices and a row of the product."""
        inner = self.block(parent=None, dtypes=self.dtypes).cost(d_model, length)
        item = self.dtypes.compute_itemsize
        return {**inner, "skip": {"tokens": Cost(4 * d_model * d_model, 3 * d_model * item)}}


class NoiseHead(nn.Module):
    """Final norm, a linear map from every patch's token to its pixels, and a 3x3 convolution over the image.

    Attributes:
      patch, channels: of the image.
    """

    patch: int
    channels: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b h w c"]:
        """The image, float32; tokens are those of its patches, in row-major order of a square."""
        x = Norm("layer", dtypes=self.dtypes, name="norm")(x)
        o, dtype, c = self.patch**2 * self.channels, self.dtypes.param, self.channels
        kernel = param(self, "kernel", LECUN, (x.shape[-1], o), ("embed", None), dtype)
        bias = param(self, "bias", ZEROS, (o,), (None,), dtype)
        rows = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        image = unpatched(rows + bias.astype(jnp.float32)[None, None], self.patch)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", (0, 1, 2), 3)
        mix = param(self, "conv", init, (3, 3, c, c), (None, None, None, None), dtype)
        shift = param(self, "conv_bias", ZEROS, (c,), (None,), dtype)
        image = jax.lax.conv_general_dilated(
            image, mix.astype(jnp.float32), (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return image + shift.astype(jnp.float32)[None, None, None]

    def cost(self, d_model: int, tokens: int) -> Cost:
        """Price of one image of so many patches; every pixel of the convolution counts nine neighbours."""
        o, pixels = self.patch**2 * self.channels, tokens * self.patch**2
        flops = 2 * d_model * o * tokens + 2 * 9 * self.channels**2 * pixels
        return Cost(flops, tokens * (d_model * self.dtypes.compute_itemsize + 4 * o))


class UViT(nn.Module):
    """x_t and a time to the noise in x_t.

    One token for the time (its sinusoid, no MLP) stands before those of the patches; learned positions are added. Then
    ``depth`` / 2 blocks, one in the middle, and ``depth`` / 2 that each read the output of an early one as well, last
    in first out. Blocks are numbered through: a middle segment of an executor is `run_block`.

    Attributes:
      size: side of the square image in pixels.
      channels: c.
      patch: side of a patch; divides ``size``.
      d_model: d, even.
      depth: blocks besides the middle one, even.
      block: factory of a dense block (not causal).
      layers, remat: as in `DecoderLM`.
    """

    size: int
    channels: int
    patch: int
    d_model: int
    depth: int
    block: Factory = Block
    layers: Execution = "scan"
    remat: Remat = "none"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_execution(self.layers, self.remat)
        check_factory(self.block, "UViT.block")
        if self.depth < 2 or self.depth % 2:
            raise DyncompError(f"UViT.depth={self.depth}: use an even number of 2 or more")
        if self.size % self.patch:
            raise DyncompError(f"UViT.patch={self.patch} does not divide size={self.size}")
        super().__post_init__()

    def setup(self):  # noqa: D102
        o, dtype, d = self.patch**2 * self.channels, self.dtypes.param, self.d_model
        small = nn.initializers.normal(0.02)
        self.kernel = param(self, "kernel", LECUN, (o, d), (None, "embed"), dtype)
        self.bias = param(self, "bias", ZEROS, (d,), ("embed",), dtype)
        self.place = param(self, "place", small, (self.length, d), (None, "embed"), dtype)
        self.group = self._stacks()
        self.head = NoiseHead(self.patch, self.channels, self.dtypes)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Early blocks, the middle one, late blocks."""
        late = functools.partial(SkipBlock, block=self.block)
        return Group([self.block], self.half), Group([self.block]), Group([late], self.half)

    def _stacks(self, **kwargs: Any) -> list[GroupStack]:
        return [
            GroupStack(group, self.layers, self.remat, self.dtypes, **kwargs)
            for group in self.groups
        ]

    @property
    def half(self) -> int:
        """Early blocks, and late ones."""
        return self.depth // 2

    @property
    def blocks(self) -> int:
        """Blocks in total."""
        return self.depth + 1

    @property
    def length(self) -> int:
        """t: the time's token and the patches'."""
        return 1 + (self.size // self.patch) ** 2

    def skip_of(self, index: int) -> int | None:
        """The early block whose output block ``index`` reads."""
        return self.depth - index if index > self.half else None

    def __call__(
        self, images: Float[Array | np.ndarray, "b h w c"], times: Float[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """The noise, float32."""
        return self.predict(self.hidden(images, times)[-1])

    def embed(
        self, images: Float[Array | np.ndarray, "b h w c"], times: Float[Array, "b"]
    ) -> Float[Array, "b t d"]:
        """Tokens: the first segment.

        Raises:
          DyncompError: images of another shape.
        """
        if images.shape[1:] != (self.size, self.size, self.channels):
            raise DyncompError(
                f"UViT: images of {images.shape[1:]}; made for {self.size}x{self.size}x{self.channels}"
            )
        rows = patches(images, self.patch).astype(self.dtypes.compute)
        tokens = rows @ self.kernel.astype(rows.dtype) + self.bias.astype(rows.dtype)[None, None]
        time = time_embedding(times, self.d_model).astype(rows.dtype)[:, None]
        x = jnp.concatenate([time, tokens], axis=1)
        return constrain(x + self.place.astype(x.dtype)[None], ACTIVATION)

    def hidden(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        times: Float[Array, "b"],
        train: bool = False,
    ) -> Float[Array, "x b t d"]:
        """Every block's output, in order of execution."""
        x, parts, cache = self.embed(images, times), {}, None
        for index, stack in enumerate(self.group):
            if index == 2:
                cache = self._skips(parts["group_0"])
            x, aux = stack(x, None, None, cache, train, ("hidden",))
            parts[f"group_{index}"] = aux
        return jnp.stack(block_outputs(self.groups, nest(**parts).plans))

    def _skips(self, early: Aux) -> dict[str, Any]:
        """The early blocks' outputs, last first, where each late block looks for its own."""
        skips = early.plans["block_0"]["hidden"][::-1]
        if self.group[2].scanned:
            return {"layers": {"block_0": {"skip": skips}}}
        return {f"layers_{i}": {"block_0": {"skip": skip}} for i, skip in enumerate(skips)}

    def run_block(
        self, index: int, x: Float[Array, "b t d"], skip: Float[Array, "b t d"] | None = None
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Block ``index`` alone, with the output of block `skip_of` where there is one. Needs ``layers="unroll"``."""
        for stack in self.group:
            if index < stack.depth:
                more = () if skip is None else (None, None, {"skip": skip})
                return stack.run(index, x, *more)
            index -= stack.depth
        raise DyncompError(f"block {index + self.blocks} past the last of {self.blocks}")

    def predict(self, x: Float[Array, "*n t d"]) -> Float[Array, "*m"]:
        """The noise, float32 [*n h w c], that the head reads from the output of any block."""
        # The batch goes before what else leads (blocks): merged behind it, a mesh could not keep it split.
        tokens = jnp.moveaxis(x[..., 1:, :], -3, 0)
        images = self.head(tokens.reshape(-1, *tokens.shape[-2:]))
        return jnp.moveaxis(images.reshape(*tokens.shape[:-2], *images.shape[1:]), 0, -4)

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices: ``embed`` and ``head`` an image, the groups' events as everywhere."""
        d, patched = self.d_model, self.length - 1
        o, item = self.patch**2 * self.channels, self.dtypes.compute_itemsize
        groups = {
            f"group_{index}": stack.cost(d, self.length)
            for index, stack in enumerate(self._stacks(parent=None))
        }
        head = NoiseHead(self.patch, self.channels, self.dtypes, parent=None)
        embed = Cost(2 * o * d * patched, patched * (4 * o + d * item))
        return {"embed": {"images": embed}, **groups, "head": {"images": head.cost(d, patched)}}


def unpatched(rows: Float[Array, "*n t m"], patch: int) -> Float[Array, "*k"]:
    """Square images [*n h w c] from their patches; inverse of `vit.patches`."""
    lead, (t, m) = rows.shape[:-2], rows.shape[-2:]
    side, c = round(t**0.5), m // patch**2
    grid = rows.reshape(*lead, side, side, patch, patch, c).swapaxes(-4, -3)
    return grid.reshape(*lead, side * patch, side * patch, c)
