"""Leaving where hidden states stop to change: no head, no gate, so that an encoder can end early, too (MuE).

"You Need Multiple Exiting" (arXiv 2211.11152): after each layer the cosine between its output and that of the layer
before, over the *flattened* sequence (tokens x channels as one vector), is compared with a threshold. Both are raw
states of the residual stream. The layer has run by then, so its output is what leaves.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dyncomp.core.choose import first_exit
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import ExitPlan
from dyncomp.core.typing import Array, Bool, Float, Int

TINY = 1e-30
"""Below any norm that decides; a vector of zeros has similarity 0 with everything."""


def flat_cosine(
    x: Float[Array, "b t d"], y: Float[Array, "b t d"], mask: Bool[Array, "b t"] | None = None
) -> Float[Array, "b"]:
    """Cosine of two sequences as single vectors, float32 in [-1, 1], one an example.

    Clamped: rounding gives about a quarter of *equal* vectors more than 1.

    Args:
      mask: False for padding, which would make any two sequences alike.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if mask is not None:
        x, y = (jnp.where(mask[:, :, None], part, 0.0) for part in (x, y))
    dot = lambda a, b: jnp.sum(a * b, axis=(1, 2))
    length = jnp.sqrt(dot(x, x)) * jnp.sqrt(dot(y, y))
    return jnp.clip(dot(x, y) / jnp.maximum(length, jnp.float32(TINY)), -1.0, 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaturationRule:
    """Leave after the first layer whose output is more similar to its input than the threshold.

    The state is the hidden state of the layer before, so the rule of one stream is a fold over its layers. The
    comparison is strict: nobody leaves at a threshold of 1 or more, everybody after the first layer below -1.

    Attributes:
      threshold: similarity to exceed; depends on the network (the norm of a pre-norm residual stream grows with depth,
        and similarity with it), so set it by `similarities` on held-out data.
    """

    threshold: float = 0.95

    def initial(self) -> float:
        """The similarity to exceed."""
        return self.threshold

    def start(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the first layer reads."""
        return x

    def step(
        self,
        state: Float[Array, "b t d"],
        x: Float[Array, "b t d"],
        mask: Bool[Array, "b t"] | None,
        threshold: Float[Array, ""] | Float[Array, "b"],
    ) -> tuple[Array, Bool[Array, "b"], Float[Array, "b"]]:
        """(state, leave, score) after one layer, whose output is ``x``."""
        score = flat_cosine(x, state, mask)
        return x, score > threshold, score

    def cost(self, d_model: int) -> Cost:
        """Price of one token of one decision: three dot products."""
        return Cost(6 * d_model)


def similarities(
    states: Float[Array, "l1 b t d"], mask: Bool[Array, "b t"] | None = None
) -> Float[Array, "l b"]:
    """s_i of every layer: output of layer i against that of layer i - 1; ``states[0]`` is the embedded input."""
    pairs = zip(states[1:], states[:-1], strict=True)
    return jnp.stack([flat_cosine(new, old, mask) for new, old in pairs])


def saturated(
    scores: Float[Array, "l b"], threshold: Float[Array, ""] | Float[Array, "b"]
) -> ExitPlan:
    """Where each example leaves, from all similarities of a full pass; exit i is after i + 1 layers.

    The last layer's similarity decides nothing.
    """
    return first_exit((scores[:-1] > threshold).T, scores[:-1].T)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decay:
    """A threshold that is stricter for early words: clip(beta theta + (1 - beta) exp(-tau t / T), 0, 1).

    T is the most words that may be written, fixed in advance. The formula follows CALM (arXiv 2207.07061); that MuE
    uses the same is a reconstruction. It does not act within [0, 1] but where theta lies outside.

    Attributes:
      beta: share of the threshold itself; 1 keeps it constant, unclipped.
      tau: how fast the rest fades.
    """

    beta: float = 0.95
    tau: float = 1.0

    def __post_init__(self):
        if not 0 <= self.beta <= 1 or self.tau < 0:
            raise DyncompError(
                f"Decay: beta={self.beta}, tau={self.tau}; use 0 <= beta <= 1 and tau >= 0"
            )

    def at(
        self, theta: Float[Array, ""], step: Int[Array, "*b"], steps: int
    ) -> Float[Array, ""] | Float[Array, "*b"]:
        """The threshold of word ``step`` (0 first) of at most ``steps``."""
        if self.beta == 1.0:
            return theta
        fade = jnp.exp(jnp.float32(-self.tau) * step.astype(jnp.float32) / jnp.float32(steps))
        share = jnp.float32(self.beta)
        return jnp.clip(share * theta + (jnp.float32(1) - share) * fade, 0.0, 1.0)


def joined_layers(
    image: Int[np.ndarray, "b"],
    text: Int[np.ndarray, "b"],
    patches: int,
    tokens: Int[np.ndarray, "b"],
) -> Float[np.ndarray, "b"]:
    """n_E of two streams: layers run, weighted by how many positions ran them. The paper does not say how it joins."""
    return (image * patches + text * tokens) / (patches + tokens)


def time_reduction(
    encoder: Float[np.ndarray, "b"],
    decoder: Int[np.ndarray, "b t"],
    words: Bool[np.ndarray, "b t"],
    depths: tuple[int, int],
) -> float:
    """Expected time reduction: 1 - sum over words of (n_E + n_D) / sum over words of (N_E + N_D).

    The encoder is charged once a *word*, as in the paper (reconstructed), though it runs once; true FLOPs are in the
    ledger.

    Args:
      encoder: n_E of each example.
      decoder: n_D of each word.
      words: True where a word was written.
      depths: (N_E, N_D).
    """
    spent = np.where(words, encoder[:, None].astype(np.float64) + decoder, 0.0).sum()
    return float(1.0 - spent / (words.sum() * sum(depths)))
