"""The best exit in hindsight: what gates are trained towards, and an upper bound no rule can see."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int

TargetScore = Literal["ce", "error", "confidence"]


def cross_entropy(logits: Float[Array, "x b c"], labels: Int[Array, "b"]) -> Float[Array, "x b"]:
    """-log p(label) of every exit, nats."""
    tiled = jnp.broadcast_to(labels, logits.shape[:-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tiled)


def exit_loss(
    logits: Float[Array, "x b c"], labels: Int[Array, "b"], score: TargetScore = "ce"
) -> Float[Array, "x b"]:
    """How bad each exit's answer is: cross-entropy; 0/1 error; or minus p_max if right and 0 if wrong.

    Raises:
      DyncompError: unknown ``score``.
    """
    if score == "ce":
        return cross_entropy(logits, labels)
    right = jnp.argmax(logits, axis=-1) == labels[None]
    if score == "error":
        return 1.0 - right.astype(jnp.float32)
    if score == "confidence":
        return -jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1) * right
    raise DyncompError(f"score={score!r}: use 'ce', 'error' or 'confidence'")


def best_exit(
    loss: Float[Array, "x b"], costs: Float[Array, "x"], lam: float | Array
) -> Int[Array, "b"]:
    """t* = argmin_l loss_l + lambda c_l; ties go to the earliest exit. The last index is the final classifier."""
    return jnp.argmin(loss + lam * costs[:, None], axis=0).astype(jnp.int32)


def first_right(right: Bool[Array, "x b"]) -> Int[Array, "b"]:
    """The first exit that is right, the last where none is (arXiv 2303.10276's upper bound).

    It bounds accuracy, not cost: a rule that lets examples that are never right leave early may be cheaper.
    """
    never = jnp.full(right.shape[1:], right.shape[0] - 1, jnp.int32)
    return jnp.where(jnp.any(right, axis=0), jnp.argmax(right, axis=0).astype(jnp.int32), never)
