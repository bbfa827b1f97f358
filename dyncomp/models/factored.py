"""A language model over tokens of several digits: their embeddings are added."""

from collections.abc import Sequence

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int
from dyncomp.models.decoder_lm import DecoderLM


class FactoredLM(DecoderLM):
    """`DecoderLM` whose tokens are numbers of mixed radix; an embedding is the sum of its digits' (`tasks.Recall`).

    Attributes:
      radices: how many symbols each digit has, lowest first. The table holds the first digit's symbols, then the
        second's, and so on: ``vocab_size`` is their sum, and logits are over all of them.
    """

    radices: Sequence[int] = ()

    def __post_init__(self):
        self.radices = tuple(self.radices)
        if not self.radices or min(self.radices) < 1 or sum(self.radices) != self.vocab_size:
            raise DyncompError(
                f"FactoredLM: radices {self.radices} must add up to vocab_size={self.vocab_size}"
            )
        super().__post_init__()

    def embed(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"] | None = None,
        vectors: Float[Array, "#b t d"] | None = None,
    ) -> Float[Array, "b t d"]:
        """The sum over digits.

        Raises:
          DyncompError: ``vectors`` (trained prompts) are given.
        """
        if vectors is not None:
            raise DyncompError("FactoredLM embeds digits; it takes no vectors=...")
        first, rest = tokens % self.radices[0], tokens // self.radices[0]
        x, begin = super().embed(first, positions), self.radices[0]
        for radix in self.radices[1:]:
            x = x + jnp.take(self.embedding, begin + rest % radix, axis=0).astype(x.dtype)
            rest, begin = rest // radix, begin + radix
        return x
