"""Continue, exit or stop: a three-way controller between layers (arXiv 2401.09964 and its code).

After an exit layer a small classifier on the hidden state says: *continue* to the next layers, *exit* with this layer's
own head, or *stop* the completion, because no layer will get the token right. Decisions are ints: `STOP`, `EXIT`,
`CONTINUE`. Letters: ``x`` exit layers in order, the last layer among them where it has a decision; ``n`` tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int

STOP, EXIT, CONTINUE = 0, 1, 2


def correct_at(logits: Float[Array, "x n v"], targets: Int[Array, "n"]) -> Bool[Array, "x n"]:
    """Whether each exit's argmax is the target. Logits at position t predict the token at t + 1: shift first."""
    return jnp.argmax(logits, axis=-1) == targets[None]


def decision_labels(correct: Bool[Array, "x n"]) -> Int[Array, "x n"]:
    """What the controller should say, int32: per token, STOP everywhere if no exit is ever right; else CONTINUE
    before the first that is right and EXIT from there on, also where a deeper one would be wrong again.
    """
    seen = jnp.cumsum(correct.astype(jnp.int32), axis=0) > 0
    label = jnp.where(seen, EXIT, CONTINUE)
    return jnp.where(jnp.any(correct, axis=0)[None], label, STOP).astype(jnp.int32)


def controller_loss(
    logits: Float[Array, "x n c"],
    labels: Int[Array, "x n"],
    mask: Float[Array, "n"] | None = None,
    *,
    weighting: Literal["ordinal", "uniform"] = "ordinal",
) -> Float[Array, ""]:
    """sum_k k CE_k / sum_k k over exits k = 1, 2, ..: deeper ones weigh more; ``uniform`` is the plain mean.

    CE_k is the mean cross-entropy over tokens that count.

    Args:
      logits: float32 [x n 3].
      labels: see `decision_labels`.
      mask: 1 where a token counts.

    Raises:
      DyncompError: unknown ``weighting``.
    """
    if weighting not in ("ordinal", "uniform"):
        raise DyncompError(f"weighting={weighting!r}: use 'ordinal' or 'uniform'")
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    counted = jnp.ones(ce.shape[1:], jnp.float32) if mask is None else mask
    means = jnp.sum(ce * counted[None], axis=1) / jnp.maximum(jnp.sum(counted), 1.0)
    exits = ce.shape[0]
    k = jnp.arange(1, exits + 1) if weighting == "ordinal" else jnp.ones(exits)
    weights = k.astype(jnp.float32)
    return jnp.sum(weights * means) / jnp.sum(weights)


def decision(
    logits: Float[Array, "*n c"], tau_exit: Float[Array, ""], tau_stop: Float[Array, ""]
) -> Int[Array, "*n"]:
    """STOP, EXIT or CONTINUE, int32: the argmax, if its probability is strictly above its threshold; else CONTINUE.

    Thresholds are run-time: 0 lets the argmax decide, 1 or more disables.

    Args:
      logits: float32 [..., 3] of the controller.
      tau_exit: for EXIT.
      tau_stop: for STOP.
    """
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    best = jnp.argmax(p, axis=-1)
    stop = (best == STOP) & (p[..., STOP] > tau_stop)
    leave = (best == EXIT) & (p[..., EXIT] > tau_exit)
    return jnp.where(stop, STOP, jnp.where(leave, EXIT, CONTINUE)).astype(jnp.int32)


@struct.dataclass
class Walk:
    """How a token went through the exits.

    Attributes:
      exit: int32 [n], the exit that decided; the last where none did.
      stopped: bool [n], whether it said stop: the completion ends and the token is not emitted.
    """

    exit: Int[Array, "n"]
    stopped: Bool[Array, "n"]


def walk(decisions: Int[Array, "x n"]) -> Walk:
    """The first decision that is not CONTINUE. At the last exit EXIT and CONTINUE mean the same."""
    decided = decisions != CONTINUE
    decided = decided.at[-1].set(True)
    exit_index = jnp.argmax(decided, axis=0).astype(jnp.int32)
    said = jnp.take_along_axis(decisions, exit_index[None], axis=0)[0]
    return Walk(exit_index, said == STOP)


def mean_layers(
    layers: Int[Array, "b t"], emitted: Bool[Array, "b t"], n_layers: int
) -> Float[Array, ""]:
    """Mean number of layers over generated tokens, float32; 0 if there are none.

    The first generated token of each completion runs without the controller and counts ``n_layers``, whatever
    ``layers`` says in column 0 (arXiv 2401.09964's released decoding).

    Args:
      layers: int32, layers run for each token.
      emitted: which tokens count.
    """
    first = jnp.arange(layers.shape[1])[None, :] == 0
    run = jnp.where(emitted, jnp.where(first, n_layers, layers), 0)
    total = jnp.maximum(jnp.sum(emitted, dtype=jnp.int32), 1)
    return jnp.sum(run, dtype=jnp.int32).astype(jnp.float32) / total.astype(jnp.float32)
