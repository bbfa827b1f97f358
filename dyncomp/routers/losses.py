"""Auxiliary losses of routers: raw values, float32 or more; the objective weighs them. Padding rows count nowhere.

Statistics are taken over all rows that the router sees: the global batch of a step (of a part of it, where the step
accumulates), so they mean the same on one device and on many.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float

Choices = Literal["all", "first"]


def mean_rows(
    values: Float[Array, "n *rest"], mask: Float[Array, "n"] | None
) -> Float[Array, "*rest"]:
    """Mean over real rows; 0 when there is none."""
    if mask is None:
        return jnp.mean(values, axis=0)
    weights = mask.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.sum(values * weights, axis=0) / jnp.maximum(jnp.sum(weights), 1.0)


def balance_loss(
    probabilities: Float[Array, "n e"],
    plan: RoutePlan,
    mask: Float[Array, "n"] | None = None,
    *,
    choices: Choices = "all",
) -> Float[Array, ""]:
    """e * sum_i f_i P_i over experts (Fedus et al. 2021, eq. 4; Lepikhin et al. 2020).

    P_i is the mean probability, f_i the fraction of rows that chose expert i; only P carries gradient. Two
    normalisations are in use. Over ``"all"`` choices the f_i sum to the mean number of chosen experts, and so does the
    loss where f or P is uniform (flaxformer, transformers' Mixtral, arXiv 2403.07652). Over the ``"first"`` choices
    they sum to 1 (GShard, V-MoE, Tutel). Neither is a lower bound: f and P may disagree.
    """
    share = _share(plan, probabilities.shape[-1], mask, choices)
    return probabilities.shape[-1] * jnp.sum(share * mean_rows(probabilities, mask))


def heterogeneous_loss(
    probabilities: Float[Array, "n e"],
    plan: RoutePlan,
    weights: Float[Array, "e"],
    mask: Float[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """sum_i w_i f_i P_i, f over all choices (MoE++, arXiv 2410.07348, eq. 7): cheap experts weigh less and fill up.

    No factor e. Where f follows P the constrained minimum has P_i proportional to 1/w_i.
    """
    share = _share(plan, probabilities.shape[-1], mask, "all")
    return jnp.sum(weights * share * mean_rows(probabilities, mask))


def _share(plan: RoutePlan, experts: int, mask: Array | None, choices: Choices) -> Array:
    """Fraction of rows that chose each expert; no gradient."""
    if choices == "first":
        plan = RoutePlan(plan.experts[:, :1], plan.weights[:, :1], plan.keep[:, :1])
    rows = plan.keep.shape[0] if mask is None else jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1)
    # The load of a plan is counted once a layer: dispatch, losses and figures share the compiled count.
    return jax.lax.stop_gradient(plan.load(experts).astype(jnp.float32) / rows)


def imbalance(plan: RoutePlan, num_experts: int) -> Float[Array, ""]:
    """Largest load / mean load: 1 where all experts get equally many rows. No gradient; 0 for an empty plan."""
    load = plan.load(num_experts).astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.max(load) / jnp.maximum(jnp.mean(load), 1e-9))


def importance_loss(
    probabilities: Float[Array, "n e"], mask: Float[Array, "n"] | None = None
) -> Float[Array, ""]:
    """Squared coefficient of variation over experts of the summed probabilities (Shazeer et al. 2017, eq. 7).

    Of the whole softmax without noise, as V-MoE has it (Shazeer et al. sum the sparse gates). Population variance.
    """
    return _variation(mean_rows(probabilities, mask))


def load_loss(
    clean: Float[Array, "n e"],
    noisy: Float[Array, "n e"],
    std: Float[Array, "#n #e"],
    k: int,
    mask: Float[Array, "n"] | None = None,
    *,
    leave_out: bool = False,
) -> Float[Array, ""]:
    """Squared coefficient of variation of each expert's expected number of rows under fresh noise.

    The probability that expert i is chosen is Phi((clean_i - threshold) / std), the threshold being the k-th highest
    noisy logit of the row (V-MoE). With ``leave_out`` it is the k-th highest of the other experts, which is exact
    where only expert i's noise is drawn again (Shazeer et al. 2017, eq. 8-9); the two differ for chosen experts only.

    Args:
      clean, noisy: logits without and with noise.
      std: standard deviation of the noise.
    """
    ordered = jax.lax.top_k(noisy, min(k + 1, noisy.shape[-1]))[0]
    threshold = ordered[:, k - 1 : k]
    if leave_out:
        if k >= noisy.shape[-1]:
            return jnp.float32(0)  # every expert is always chosen
        threshold = jnp.where(noisy >= threshold, ordered[:, k : k + 1], threshold)
    chosen = jax.scipy.stats.norm.cdf((clean - threshold) / std)
    return _variation(mean_rows(chosen, mask))


def _variation(values: Float[Array, "e"]) -> Float[Array, ""]:
    mean = jnp.mean(values)
    return jnp.mean(jnp.square(values - mean)) / jnp.maximum(jnp.square(mean), 1e-20)


def entropy_loss(
    logits: Float[Array, "n e"], mask: Float[Array, "n"] | None = None
) -> Float[Array, ""]:
    """Mean entropy of softmax(logits) in nats: the dynamic loss of arXiv 2403.07652; minimised, it sharpens routing."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return mean_rows(-jnp.sum(jnp.exp(log_p) * log_p, axis=-1), mask)


def z_loss(logits: Float[Array, "n e"], mask: Float[Array, "n"] | None = None) -> Float[Array, ""]:
    """Mean squared log-partition (Zoph et al. 2022, eq. 5): keeps logits small."""
    return mean_rows(jnp.square(jax.nn.logsumexp(logits, axis=-1)), mask)
