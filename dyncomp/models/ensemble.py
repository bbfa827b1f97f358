"""Self-ensembles: one network with random parts, run several times, its probabilities averaged."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.aux import Aux
from dyncomp.core.typing import Array, Float, Key, Variables
from dyncomp.models.layout import apply


def self_ensemble(
    model: nn.Module,
    variables: Variables,
    inputs: Any,
    keys: Key[Array, "samples"],
    mask: Array | None = None,
) -> tuple[Float[Array, "b *t v"], Aux]:
    """Passes with the random stream "dropout", one a key, averaged in probability space (arXiv 2306.01705).

    The mean of probabilities has at most the mean of the passes' losses (Jensen); the mean of logits is another thing.

    Args:
      model: gives logits; e.g. with `attention.Attention.sampler`.
      variables: as stored.
      keys: ``jax.random.split(key, samples)``.

    Returns:
      Logarithms of the mean probabilities, float32, which serve as logits, and the events of all passes together.
    """

    def one(total: Array, key: Any) -> tuple[Array, Any]:
        logits, aux = apply(model, variables, inputs, mask=mask, rngs={"dropout": key})
        return jnp.logaddexp(total, jax.nn.log_softmax(logits.astype(jnp.float32))), aux.events

    shape = jax.eval_shape(lambda key: one(jnp.float32(0), key)[0], keys[0]).shape
    total, events = lax.scan(one, jnp.full(shape, -jnp.inf, jnp.float32), keys)
    events = jax.tree.map(lambda counts: jnp.sum(counts, axis=0), events)
    return total - jnp.log(jnp.float32(keys.shape[0])), Aux(events=events)


def ensemble_nll(nll: Float[Array, "samples *n"]) -> Float[Array, "samples *n"]:
    """Entry s is the loss of the ensemble of passes 0 .. s: minus the logarithm of their mean probability.

    Args:
      nll: each pass's negative log-likelihood of the targets, nats.
    """
    sizes = jnp.arange(1, len(nll) + 1, dtype=jnp.float32)
    sizes = sizes.reshape(-1, *[1] * (nll.ndim - 1))
    return jnp.log(sizes) - lax.cumlogsumexp(-nll.astype(jnp.float32), axis=0)
