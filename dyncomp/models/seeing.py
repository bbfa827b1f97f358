"""Language blocks that look at pictures: gated cross-attention before a block, and what turns pictures into tokens.

The layout of Flamingo (Alayrac et al. 2022) and OpenFlamingo: the language blocks stay as they are, and each is
preceded by cross-attention whose gates start at 0, so that training begins with the language model itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention import MediaAttention
from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.core.aux import Aux, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.experts import MLP
from dyncomp.models.block import ACTIVATION
from dyncomp.models.exiting import block_prices
from dyncomp.models.group import Execution, Group, GroupStack, Remat
from dyncomp.models.norm import Norm, NormKind
from dyncomp.models.vit import PatchEmbed


class GatedCross(nn.Module):
    """``x + tanh(a) cross(norm(x), media)``, then ``x + tanh(b) ffn(norm(x))``; a and b start at 0.

    Attributes:
      cross: factory of cross-attention.
      ffn: factory of the ffn seam.
      norm: kind of both norms.
      gate: where both gates start; 0 leaves x as it is.
    """

    cross: Factory = MediaAttention
    ffn: Factory = MLP
    norm: NormKind = "layer"
    gate: float = 0.0
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.cross, "GatedCross.cross")
        check_factory(self.ffn, "GatedCross.ffn")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], media: Float[Array, "b s m"], mask: Array | None = None
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """x after looking at the media."""
        norm = lambda name: Norm(self.norm, dtypes=self.dtypes, name=name)
        start = nn.initializers.constant(self.gate)
        gate = lambda name: jnp.tanh(param(self, name, start, (1,), (None,)))[None, None]
        y, seen = self.cross(name="cross", dtypes=self.dtypes)(norm("cross_norm")(x), media, mask)
        x = x + gate("cross_gate").astype(x.dtype) * y
        y, fed = self.ffn(name="ffn", dtypes=self.dtypes)(norm("ffn_norm")(x), mask)
        x = x + gate("ffn_gate").astype(x.dtype) * y
        return constrain(x, ACTIVATION), nest(cross=seen, ffn=fed)

    def cost(self, d_model: int, media_width: int) -> dict[str, Any]:
        """Prices of both parts."""
        make = lambda factory: factory(parent=None, dtypes=self.dtypes)
        return {
            "cross": make(self.cross).cost(d_model, media_width),
            "ffn": make(self.ffn).cost(d_model),
        }


class SeeingBlock(nn.Module):
    """A block that is preceded by gated cross-attention; the media come over depth, as ``below["media"]`` [b s m].

    Attributes:
      block: factory of the block, `models.Block`.
      look: factory of what precedes it, `GatedCross`; None for a block that does not look.
      media_width: m, for the price.
    """

    block: Factory
    look: Factory | None = GatedCross
    media_width: int = 0
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.block, "SeeingBlock.block")
        if self.look is not None:
            check_factory(self.look, "SeeingBlock.look")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: Any = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        below: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Looks, then runs the block; ``capture=("hidden",)`` is the block's output, as in `Block`."""
        parts, below = {}, below or {}
        if self.look is not None:
            look = self.look(name="look", dtypes=self.dtypes)
            x, parts["look"] = look(x, below["media"], mask)
        block = self.block(name="block", dtypes=self.dtypes)
        x, aux = block(x, positions, mask, cache, train=train, capture=capture)
        hidden = {"hidden": aux.plans["hidden"]} if "hidden" in capture else {}
        plans = {name: plan for name, plan in aux.plans.items() if name != "hidden"}
        whole = nest(block=dataclasses.replace(aux, plans=plans), **parts)
        return x, dataclasses.replace(whole, plans={**whole.plans, **hidden}, below=dict(below))

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """Prices of the block's and the look's events."""
        table = {"block": self.block(parent=None, dtypes=self.dtypes).cost(d_model, length)}
        if self.look is not None:
            look = self.look(parent=None, dtypes=self.dtypes)
            table["look"] = look.cost(d_model, self.media_width)
        return table


class Resampler(nn.Module):
    """Any number of tokens to a few: learned latents that read them (the Perceiver resampler of Flamingo, sec. 3.1.1).

    Every layer's latents read the tokens and the latents themselves, then an ffn unit runs; a norm ends it.

    Attributes:
      latents: how many.
      depth: layers.
      cross, ffn: factories.
    """

    latents: int = 64
    depth: int = 6
    cross: Factory = MediaAttention
    ffn: Factory = MLP
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, tokens: Float[Array, "b s m"]) -> Float[Array, "b q m"]:
        """The latents after they have read."""
        b, _, width = tokens.shape
        norm = lambda name: Norm("layer", dtypes=self.dtypes, name=name)
        start, shape = nn.initializers.normal(1.0), (self.latents, width)
        first = param(self, "latents", start, shape, (None, "embed"), self.dtypes.param)
        x = jnp.broadcast_to(first.astype(tokens.dtype)[None], (b, *shape))
        for index in range(self.depth):
            own = norm(f"latent_norm_{index}")(x)
            read = jnp.concatenate([norm(f"token_norm_{index}")(tokens), own], axis=1)
            x = x + self.cross(name=f"cross_{index}", dtypes=self.dtypes)(own, read)[0]
            unit = self.ffn(name=f"ffn_{index}", dtypes=self.dtypes)
            x = x + unit(norm(f"ffn_norm_{index}")(x))[0]
        return norm("final_norm")(x)

    def cost(self, width: int, tokens: int) -> Cost:
        """Price of one set of tokens."""
        make = lambda factory: factory(parent=None, dtypes=self.dtypes)
        cross, q = make(self.cross).cost(width, width), self.latents
        read = tokens + q
        layer = cross["tokens"] * q + cross["media"] * read + cross["seen_pairs"] * (q * read)
        return (layer + make(self.ffn).cost(width)["tokens"] * q) * self.depth


class ImageTokens(nn.Module):
    """Pictures to tokens: patches with positions, then blocks and a norm, if any (a vision encoder without its head).

    Attributes:
      patch: side in pixels.
      d_model: width of a token.
      groups: blocks; empty for patches alone, without a norm.
      class_token: put one first, as CLIP's encoder does.
      coordinates: add two channels, every pixel's place in -1..1 (Liu et al. 2018), for encoders that are small.
    """

    patch: int
    d_model: int
    groups: Sequence[Group] = ()
    class_token: bool = False
    coordinates: bool = False
    layers: Execution = "scan"
    remat: Remat = "none"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        self.groups = tuple(self.groups)
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.patches = PatchEmbed(self.patch, self.d_model, self.class_token, self.dtypes)
        self.group = [
            GroupStack(group, self.layers, self.remat, self.dtypes) for group in self.groups
        ]
        self.norm = Norm("layer", dtypes=self.dtypes) if self.groups else None

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b s m"]:
        """Tokens in row-major patch order, the class token first."""
        x = self.patches(with_coordinates(images) if self.coordinates else images)
        for stack in self.group:
            x, _ = stack(x)
        return x if self.norm is None else self.norm(x)

    def length(self, size: tuple[int, int]) -> int:
        """Tokens of a picture of this height and width."""
        return (size[0] // self.patch) * (size[1] // self.patch) + self.class_token

    def cost(self, size: tuple[int, int]) -> Cost:
        """Price of one picture."""
        s, d = self.length(size), self.d_model
        channels = 3 + 2 * self.coordinates
        work = 2 * (s - self.class_token) * self.patch**2 * channels * d
        total = Cost(work, size[0] * size[1] * 12)
        table = {
            f"group_{index}": GroupStack(group, dtypes=self.dtypes, parent=None).cost(d, s)
            for index, group in enumerate(self.groups)
        }
        return sum(block_prices(table, self, s), total)


def with_coordinates(images: Float[Array, "b h w c"]) -> Float[Array, "b h w _"]:
    """Two more channels: column and row in -1..1."""
    b, h, w, _ = images.shape
    places = jnp.meshgrid(jnp.linspace(-1.0, 1.0, w), jnp.linspace(-1.0, 1.0, h))
    grid = jnp.stack(places, axis=-1).astype(images.dtype)
    return jnp.concatenate([images, jnp.broadcast_to(grid[None], (b, h, w, 2))], axis=-1)


class WordTokens(nn.Module):
    """Token numbers to embeddings; padding (a negative number) gets that of word 0, and is to be masked.

    Attributes:
      vocab: how many words.
      d_model: d.
      scale: standard deviation of the start.
    """

    vocab: int
    d_model: int
    scale: float = 0.02
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, words: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embeddings in the compute dtype."""
        shape, init = (self.vocab, self.d_model), nn.initializers.normal(self.scale)
        table = param(self, "table", init, shape, ("vocab", "embed"), self.dtypes.param)
        x = jnp.take(table, jnp.maximum(words, 0), axis=0).astype(self.dtypes.compute)
        return constrain(x, ACTIVATION)


def looked(tokens: int, media: int) -> dict[str, int]:
    """How often the events of a seeing, causal block happen in one example: for `block_prices`."""
    pairs = tokens * (tokens + 1) // 2
    return {
        "media": media,
        "seen_pairs": tokens * media,
        "pair_blocks": pairs // PAIR_BLOCK,
        "pairs": pairs % PAIR_BLOCK,
    }
