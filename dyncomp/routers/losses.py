"""Auxiliary losses of routers: raw values, float32; the objective weighs them. Padding rows count nowhere."""

import jax
import jax.numpy as jnp

from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float


def _mean(values: Float[Array, "n *rest"], mask: Float[Array, "n"] | None) -> Float[Array, "*rest"]:
    """Mean over real rows; 0 when there is none."""
    if mask is None:
        return jnp.mean(values, axis=0)
    weights = mask.astype(jnp.float32).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.sum(values * weights, axis=0) / jnp.maximum(jnp.sum(weights), 1.0)


def balance_loss(
    probabilities: Float[Array, "n e"], plan: RoutePlan, mask: Float[Array, "n"] | None = None
) -> Float[Array, ""]:
    """e * sum_i f_i Q_i over experts (Fedus et al. 2021, eq. 4; selection set of arXiv 2403.07652).

    f_i is the fraction of rows whose plan contains expert i (so the f_i sum to the mean number of active experts), Q_i
    the mean probability. Only Q carries gradient. With uniform Q the value is the mean number of active experts.
    """
    experts = probabilities.shape[-1]
    selected = RoutePlan(plan.experts, plan.keep.astype(jnp.float32), plan.keep)
    chosen = selected.one_hot(experts)
    share = jax.lax.stop_gradient(_mean(chosen, mask))
    return experts * jnp.sum(share * _mean(probabilities, mask))


def entropy_loss(
    logits: Float[Array, "n e"], mask: Float[Array, "n"] | None = None
) -> Float[Array, ""]:
    """Mean entropy of softmax(logits) in nats: the dynamic loss of arXiv 2403.07652; minimised, it sharpens routing."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return _mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), mask)


def z_loss(logits: Float[Array, "n e"], mask: Float[Array, "n"] | None = None) -> Float[Array, ""]:
    """Mean squared log-partition (Zoph et al. 2022, eq. 5): keeps logits small."""
    return _mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), mask)
