"""A picture and a text read by one encoder, and words written by a decoder that reads what the encoder left."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Bool, Factory, Float, Int, check_factory
from dyncomp.models.block import ACTIVATION
from dyncomp.models.group import Execution, Group, GroupStack, Remat, check_execution
from dyncomp.models.norm import Norm, NormKind
from dyncomp.models.packed import ImageTextRow
from dyncomp.models.vit import patches
from dyncomp_kernels.dense_matmul.api import dense_matmul

Streams = Literal["apart", "joint"]


class PatchProjection(nn.Module):
    """A linear map of non-overlapping patches; without positions."""

    patch: int
    d_model: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, images: Float[Array, "b h w _"]) -> Float[Array, "b n d"]:
        """Tokens in row-major order."""
        rows = patches(images, self.patch).astype(self.dtypes.compute)
        lecun, shape = nn.initializers.lecun_normal(), (rows.shape[-1], self.d_model)
        kernel = param(self, "kernel", lecun, shape, (None, "embed"), self.dtypes.param)
        return rows @ kernel.astype(rows.dtype)


class EncoderDecoder(nn.Module):
    """The parts of an encoder-decoder over `ImageTextRow`; a wrapper decides what of it runs (`SaturatingVLM`).

    With ``streams="apart"`` the same encoder reads patches and text tokens each for themselves, with no attention from
    one to the other (the decomposed encoder of arXiv 2211.11152); with "joint" it reads all of them at once. Its final
    norm comes after that, once, over both. Every stream has learned absolute positions and no relative bias: the
    released code computes one for the picture and overwrites it.

    Attributes:
      vocab_size: v, of text and words alike; the output projection is the embedding's transpose where ``tie`` says so.
      d_model: d.
      row: how inputs lie.
      patch: side of a patch.
      encoder: factory of a block with a mixer that is not causal.
      decoder: factory of a `CrossBlock`, called with ``d_model`` too.
      encoder_depth, decoder_depth: N_E, N_D.
      streams: see above.
      longest: rows of the table of word positions; default ``row.answer``.
      layers, remat: as in `DecoderLM`.
      norm, eps: of both final norms.
    """

    vocab_size: int
    d_model: int
    row: ImageTextRow
    patch: int
    encoder: Factory
    decoder: Factory
    encoder_depth: int
    decoder_depth: int
    streams: Streams = "apart"
    longest: int | None = None
    tie: bool = False
    layers: Execution = "scan"
    remat: Remat = "none"
    norm: NormKind = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_execution(self.layers, self.remat)
        check_factory(self.encoder, "EncoderDecoder.encoder")
        check_factory(self.decoder, "EncoderDecoder.decoder")
        if self.streams not in ("apart", "joint"):
            raise DyncompError(f"EncoderDecoder.streams={self.streams!r}: use 'apart' or 'joint'")
        super().__post_init__()

    def setup(self):  # noqa: D102
        small, d, dtype = nn.initializers.normal(0.02), self.d_model, self.dtypes.param
        table = lambda name, rows, axis: param(self, name, small, (rows, d), (axis, "embed"), dtype)
        norm = lambda: Norm(self.norm, self.eps, self.dtypes)
        self.patches = PatchProjection(self.patch, d, self.dtypes)
        self.embedding = table("embed", self.vocab_size, "vocab")
        longest = self.longest or self.row.answer
        rows = {"image": self.patch_tokens, "text": self.row.text, "words": longest}
        self.places = {name: table(f"{name}_positions", n, None) for name, n in rows.items()}
        self.content_norm = {name: norm() for name in rows}
        self.place_norm = {name: norm() for name in rows}
        self.reader, self.writer = self._stacks()
        self.memory_norm, self.final_norm = norm(), norm()
        if not self.tie:
            lecun = nn.initializers.lecun_normal()
            self.head = param(self, "head", lecun, (d, self.vocab_size), ("embed", "vocab"), dtype)

    def blocks(self) -> tuple[Factory, Factory]:
        """Factories of an encoder's and of a decoder's block."""

        def decoder(**kwargs: Any) -> nn.Module:
            return self.decoder(d_model=self.d_model, **kwargs)

        return self.encoder, decoder

    def _stacks(self, **kwargs: Any) -> list[GroupStack]:
        depths = (self.encoder_depth, self.decoder_depth)
        groups = [Group((b,), n) for b, n in zip(self.blocks(), depths, strict=True)]
        return [GroupStack(g, self.layers, self.remat, self.dtypes, **kwargs) for g in groups]

    @property
    def patch_tokens(self) -> int:
        """P, tokens of a picture."""
        return (self.row.height // self.patch) * (self.row.width // self.patch)

    def streams_of(
        self, images: Float[Array, "b h w c"], text: Int[Array, "b q"]
    ) -> dict[str, tuple[Float[Array, "b n d"], Bool[Array, "b n"]]]:
        """Name -> (embedded tokens, which are real), one entry a stream that the encoder reads for itself."""
        x = self._placed("image", self.patches(images))
        y = self._placed("text", jnp.take(self.embedding, text, axis=0))
        real = jnp.ones(x.shape[:2], bool), text != 0
        if self.streams == "apart":
            return {"image": (x, real[0]), "text": (y, real[1])}
        return {"joint": (jnp.concatenate([x, y], axis=1), jnp.concatenate(real, axis=1))}

    def _placed(self, kind: str, content: Array, places: Array | None = None) -> Array:
        """Content and position, each behind a norm of its own (OFA), so that neither drowns the other at first."""
        where = self.places[kind]
        where = where[None] if places is None else jnp.take(where, places, axis=0)
        dtype = self.dtypes.compute
        x = self.content_norm[kind](content.astype(dtype)) + self.place_norm[kind](
            where.astype(dtype)
        )
        return constrain(x, ACTIVATION)

    def encode(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"], train: bool = False
    ) -> Float[Array, "l1 b n d"]:
        """Raw states of one stream at every depth, the embedded tokens first."""
        _, aux = self.reader(x, None, mask, None, train, ("hidden",))
        return jnp.concatenate([x[None], aux.plans["block_0"]["hidden"]])

    def encoder_block(self, index: int, x: Float[Array, "b n d"], mask: Array) -> Array:
        """One block of the encoder; needs ``layers="unroll"``."""
        return self.reader.run(index, x, None, mask)[0]

    def remember(self, *states: Float[Array, "b _ d"]) -> Float[Array, "b s d"]:
        """What the decoder reads: all streams' states in a row, then the encoder's final norm."""
        return self.memory_norm(jnp.concatenate(states, axis=1))

    def embed_words(self, words: Int[Array, "b t"], places: Int[Array, "#b t"]) -> Array:
        """What the decoder's first block reads, [b t d]."""
        return self._placed("words", jnp.take(self.embedding, words, axis=0), places)

    def decode(
        self,
        memory: Float[Array, "b s d"],
        seen: Bool[Array, "b s"],
        words: Int[Array, "b t"],
        train: bool = False,
    ) -> Float[Array, "l1 b t d"]:
        """Raw states of given words at every depth, embedded ones first: teacher forcing, nobody leaves."""
        x = self.embed_words(words, jnp.arange(words.shape[1], dtype=jnp.int32)[None])
        below = {"memory": memory, "seen": seen}
        _, aux = self.writer(x, None, None, None, train, ("hidden",), below)
        return jnp.concatenate([x[None], aux.plans["block_0"]["hidden"]])

    def keys_values(self, index: int, memory: Float[Array, "b s d"]) -> tuple[Array, Array]:
        """The memory's keys and values for one block of the decoder; needs ``layers="unroll"``."""
        return self.writer.layers[index].block[0].keys_values(memory)

    def decoder_block(
        self,
        index: int,
        x: Float[Array, "b 1 d"],
        step: Int[Array, "b"],
        cache: Any,
        seen: Bool[Array, "b s"],
    ) -> tuple[Float[Array, "b 1 d"], Any]:
        """One block of the decoder on one word of each row, at its place ``step``: output and extended cache."""
        y, aux = self.writer.run(index, x, step[:, None], None, cache, below={"seen": seen})
        return y, aux.cache

    def classify(self, x: Float[Array, "*n b t d"]) -> Float[Array, "*n b t v"]:
        """Final norm and output projection, shared by all layers: float32 logits."""
        x = self.final_norm(x)
        head = (self.embedding.T if self.tie else self.head).astype(x.dtype)
        logits = dense_matmul(x, head, transposed=True if self.tie else None, dtype=jnp.float32)
        names = (None,) * (logits.ndim - 3)
        return constrain(logits, (*names, "batch", "seq", "vocab"))
