"""At which sub-model a token leaves: the first that is confident, and random controls with the same histogram."""

import jax
import jax.numpy as jnp

from dyncomp.core.choose import first_exit
from dyncomp.core.plans import ExitPlan
from dyncomp.core.typing import Array, Float, Int, Key


def max_probability(logits: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """Highest probability of softmax(logits) at temperature 1, float32, in (0, 1]; no gradient."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    top = jnp.max(logits, axis=-1)
    return 1.0 / jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)


def first_confident(confidence: Float[Array, "x b"], thresholds: Float[Array, "y"]) -> ExitPlan:
    """The first exit whose confidence reaches its threshold, else the last (arXiv 2309.08968, dynamic inference).

    The paper's thresholds for 12, 16, .. of 40 layers: .95, .95, .9, .9, .8, .8, .7, and none for the last. Above 1
    nobody leaves early; at 0 everyone leaves at the first. Each token's exit is non-decreasing in every threshold.

    Args:
      confidence: float32, see `max_probability`; the last row, of the whole model, is not looked at.
      thresholds: float32 [x-1], run-time.
    """
    leave = confidence[:-1] >= thresholds[:, None]
    return first_exit(leave.T, confidence[:-1].T)


def shuffled_exits(key: Key[Array, ""], exits: Int[Array, "n"]) -> Int[Array, "n"]:
    """A control: the same exits, so exactly the same histogram, in random order."""
    return jax.random.permutation(key, exits)


def drawn_exits(key: Key[Array, ""], shares: Float[Array, "x"], n: int) -> Int[Array, "n"]:
    """A control for tokens that come one by one: exits drawn independently with the given shares, int32.

    Shares need not sum to 1 (a histogram of counts will do); an exit with share 0 is never drawn.
    """
    logits = jnp.log(shares.astype(jnp.float32))
    return jax.random.categorical(key, logits, shape=(n,)).astype(jnp.int32)
