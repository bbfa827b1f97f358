"""From logits to a token: temperature and filters, as a distribution that others can reason about."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Temperature, then top-k, top-p and min-p, in the order of Hugging Face transformers.

    All fields are static: a sampler is hashable and may be closed over by a compiled step.

    Attributes:
      temperature: divides the logits; 0 is greedy (then the filters change nothing).
      top_k: tokens whose logit is at least the k-th highest stay, so all that tie with the k-th do; 0 is off. More
        than there are tokens keeps all.
      top_p: a token stays iff the mass ranked strictly above it is below p (nucleus, arXiv 1904.09751), so the token
        that crosses p is in and at least one stays; equal tokens rank by index, lower first; 1 is off.
      min_p: a token stays iff its probability is at least this share of the highest one (arXiv 2407.01082); 0 is off.

    Raises:
      DyncompError: a field is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise DyncompError(f"temperature={self.temperature}: use 0 (greedy) or a number above")
        if self.top_k < 0:
            raise DyncompError(f"top_k={self.top_k}: use 0 (off) or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise DyncompError(f"top_p={self.top_p}: use a number in (0, 1]; 1 is off")
        if not 0 <= self.min_p <= 1:
            raise DyncompError(f"min_p={self.min_p}: use a number in [0, 1]; 0 is off")

    def logits(self, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """float32 logits of the distribution that is sampled; -inf at tokens that cannot be.

        Every row needs a finite logit; +inf and NaN are not defined.
        """
        logits = logits.astype(jnp.float32)
        if self.temperature == 0:
            best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
            return jnp.where(best, 0.0, -jnp.inf)
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits >= least, logits, -jnp.inf)
        if self.top_p < 1:
            logits = jnp.where(_nucleus(logits, self.top_p), logits, -jnp.inf)
        if self.min_p > 0:
            p = jax.nn.softmax(logits, axis=-1)
            enough = p >= self.min_p * jnp.max(p, axis=-1, keepdims=True)
            logits = jnp.where(enough, logits, -jnp.inf)
        return logits

    def probabilities(self, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """float32 probabilities of the next token; one-hot at the first highest logit when greedy."""
        return jax.nn.softmax(self.logits(logits), axis=-1)

    def __call__(
        self, key: Key[Array, ""] | Key[Array, "b"], logits: Float[Array, "b v"]
    ) -> Int[Array, "b"]:
        """One token a row, int32.

        Args:
          key: one for each row, or one of which row i uses ``fold_in(key, i)``: what a row draws does not depend on
            how many rows there are or what is in them.
          logits: raw.
        """
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = row_keys(key, logits.shape[0])
        return jax.vmap(jax.random.categorical)(keys, self.logits(logits)).astype(jnp.int32)


GREEDY = Sampler()
"""The most probable token."""


def row_keys(key: Key[Array, ""] | Key[Array, "b"], rows: int) -> Key[Array, "b"]:
    """A key for each row: as given, or ``fold_in(key, i)`` for row i."""
    if key.ndim == 1:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _nucleus(logits: Float[Array, "b v"], top_p: float) -> Bool[Array, "b v"]:
    """Which tokens of each row have less than ``top_p`` of the mass ranked above them."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    p = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    above = jnp.pad(jnp.cumsum(p, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, order].set(above < top_p)
