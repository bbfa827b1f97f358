"""Exit gates: a logistic regression on how sure an exit head is (JEI-DNN, arXiv 2310.09163)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes, widened
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float
from dyncomp.exits.heads import Exit

FEATURES = 4


def entropy(logits: Float[Array, "*n c"]) -> Float[Array, "*n"]:
    """Entropy of softmax(logits) in nats, float32 or more."""
    log_p = jax.nn.log_softmax(widened(logits), axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def gate_features(logits: Float[Array, "*n c"]) -> Float[Array, "*n u"]:
    """Four statistics of p = softmax(logits), fully detached: a gate never trains the head it looks at.

    Returns:
      float32 or more [..., 4]: max p; H(p) in nats; margin p(1) - p(2); H(p^2 / sum p^2) ("entropy_pow").
    """
    logits = widened(lax.stop_gradient(logits))
    best, _ = lax.top_k(jax.nn.softmax(logits, axis=-1), 2)
    # p^2 / sum p^2 is softmax at half the temperature, which does not underflow.
    sharp = entropy(2.0 * logits)
    return jnp.stack([best[..., 0], entropy(logits), best[..., 0] - best[..., 1], sharp], axis=-1)


class ExitGates(nn.Module):
    """Five parameters an exit: gate logit a = v . u + c on the features u of `gate_features`.

    Attributes:
      exits: y.
      bias_init: starting value of every c; 0 lets half of the mass leave at the first exit.
    """

    exits: int
    bias_init: float = 0.0
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, logits: Float[Array, "*y b c"], index: Exit | None = None) -> Array:
        """Gate logits [y b] from head logits [y b c]; with ``index`` [b] from [b c]."""
        small = nn.initializers.normal(0.01)
        u = gate_features(logits)
        shape, dtype = (self.exits, FEATURES), u.dtype.name
        weight = param(self, "weight", small, shape, ("exits", None), dtype)
        start = nn.initializers.constant(self.bias_init)
        bias = param(self, "bias", start, (self.exits,), ("exits",), dtype)
        if index is None:
            return jnp.einsum("ybu,yu->yb", u, weight) + bias[:, None]
        return u @ weight[index] + bias[index]

    def cost(self, classes: int) -> Cost:
        """Price of one example at one gate: about 9c + 6 FLOPs (softmax, two entropies, top two, dot product)."""
        return Cost(9 * classes + 6, (classes + 1) * 4)
