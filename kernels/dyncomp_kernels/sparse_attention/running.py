"""A softmax over blocks of keys, renormalised from block to block (Milakov & Gimelshein 2018; Dao et al. 2022)."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

LOWEST = jnp.finfo(jnp.float32).min
"""The score of a pair that is not seen."""


class Running(NamedTuple):
    """What the blocks so far make of some rows; float32.

    Attributes:
      top: [... n], highest score.
      total: [... n], sum of exp(score - top).
      mixed: [... n p], that sum with values.
    """

    top: Array
    total: Array
    mixed: Array

    @classmethod
    def blank(cls, shape: tuple[int, ...]) -> "Running":
        """Before the first block; ``shape`` is that of ``mixed``."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full(shape[:-1], LOWEST), zeros[..., 0], zeros)

    def add(
        self, scores: Array, mix: Callable[[Array], Array], seen: Array | None = None
    ) -> "Running":
        """With one more block.

        Args:
          scores: [... n c].
          mix: weights [... n c] -> their sum of the block's values [... n p].
          seen: pairs that count; needed where a row may have seen nothing yet, as then every weight would be 1.
        """
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1))
        weights, shrink = jnp.exp(scores - top[..., None]), jnp.exp(self.top - top)
        weights = weights if seen is None else jnp.where(seen, weights, 0.0)
        total = self.total * shrink + jnp.sum(weights, axis=-1)
        return Running(top, total, self.mixed * shrink[..., None] + mix(weights))
