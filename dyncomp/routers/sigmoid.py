"""Routers whose experts are rated one by one: sigmoid affinities balanced by a bias, and ReLU gates."""

from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.core import choose
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float
from dyncomp.routers.base import Scored


class SigmoidTopK(Scored):
    """k experts by sigmoid affinity plus a bias that only selection sees (DeepSeek-V3, arXiv 2412.19437, eq. 12-16).

    Gates: scale * s_e / sum of the chosen s. The bias balances without a loss (Wang et al. 2024): after each training
    step an expert with more rows than the mean loses ``bias_rate``, one with fewer gains it, one at the mean stays. It
    is the control ``bias`` float32 [e], saved with the state, and carries no gradient.

    Attributes:
      k: experts per row.
      scale: r, factor on the renormalised gates.
      bias_rate: u; 0 leaves the bias at 0.
      groups, keep_groups: choose within the ``keep_groups`` best of ``groups`` groups only (`choose.best_groups`);
        groups=1 for no such limit.
    """

    k: int = 2
    scale: float = 1.0
    bias_rate: float = 1e-3
    groups: int = 1
    keep_groups: int = 1

    def check(self) -> None:
        """Refuses counts that do not fit together."""
        super().check()
        e, groups, keep = self.num_experts, self.groups, self.keep_groups
        if not 1 <= self.k <= e:
            raise DyncompError(f"SigmoidTopK.k={self.k} with num_experts={e}: use 1..{e}")
        if groups > 1 and (e % groups or not 1 <= keep <= groups or self.k > keep * (e // groups)):
            raise DyncompError(
                f"SigmoidTopK: k={self.k} of the {keep} best of {groups} groups of {e} experts is not possible"
            )

    def probabilities(self, logits: Float[Array, "n e"]) -> Float[Array, "n e"]:
        """Affinities divided by their sum."""
        s = jax.nn.sigmoid(logits)
        return s / jnp.sum(s, axis=-1, keepdims=True)

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """The k best by affinity plus bias; training moves the bias."""
        affinity = jax.nn.sigmoid(logits)
        bias = self.variable("controls", "bias", jnp.zeros, (self.num_experts,), jnp.float32)
        rating = jax.lax.stop_gradient(affinity + bias.value[None])
        if self.groups > 1:
            inside = choose.best_groups(rating, self.groups, self.keep_groups)
            rating = jnp.where(inside, rating, -jnp.inf)
        experts = choose.top_k(rating, self.k).experts
        gates = jnp.take_along_axis(affinity, experts, axis=-1)
        gates = self.scale * gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-20)
        plan = RoutePlan(experts, gates, jnp.ones(experts.shape, bool), jnp.max(affinity, axis=-1))
        if train and self.bias_rate and self.is_mutable_collection("controls"):
            if not self.is_initializing():
                load = (plan if mask is None else plan.masked(mask)).load(self.num_experts)
                bias.value = balanced_bias(bias.value, load, self.bias_rate)
        return plan


def balanced_bias(bias: Float[Array, "e"], load: Any, rate: float) -> Float[Array, "e"]:
    """bias + rate * sign(mean load - load) (Wang et al. 2024, alg. 1); ``load`` int32 [e] of the whole batch."""
    load = load.astype(jnp.float32)
    return bias + jnp.float32(rate) * jnp.sign(jnp.mean(load) - load)


class ReLU(Scored):
    """Gates relu(h): experts are in use where the gate is above 0 (ReMoE, Wang et al. 2024); all differentiable.

    Its loss ``sparsity`` is lambda * sum_e g_e (mean over rows); lambda is the control ``penalty``: after each training
    step it is multiplied by ``growth`` where gates were zero less often than 1 - k / e, else divided.

    Attributes:
      k: mean experts per row to aim at.
      start: the first lambda.
      growth: a.
    """

    k: float = 2.0
    start: float = 1e-8
    growth: float = 1.2

    def check(self) -> None:
        """Refuses an aim outside (0, e]."""
        super().check()
        if not 0 < self.k <= self.num_experts or self.start <= 0 or self.growth < 1:
            raise DyncompError(
                f"ReLU: need 0 < k={self.k} <= num_experts={self.num_experts}, start > 0, growth >= 1"
            )

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """All experts with a positive gate, best first."""
        del mask, train
        weights, experts = choose.ranked(jax.nn.relu(logits))
        keep = weights > 0
        return RoutePlan(experts, jnp.where(keep, weights, 0.0), keep, weights[:, 0])

    def _losses(self, logits, noisy, std, plan, mask):
        penalty = self.variable("controls", "penalty", lambda: jnp.float32(self.start))
        real = plan if mask is None else plan.masked(mask)
        rows = plan.keep.shape[0] if mask is None else jnp.maximum(jnp.sum(mask), 1.0)
        found = super()._losses(logits, noisy, std, plan, mask)
        found["sparsity"] = jax.lax.stop_gradient(penalty.value) * jnp.sum(real.weights) / rows
        if self.is_mutable_collection("controls") and not self.is_initializing():
            used = jnp.sum(real.keep, dtype=jnp.int32).astype(jnp.float32) / rows
            heavier = jnp.float32(self.growth) ** jnp.sign(used - jnp.float32(self.k))
            penalty.value = penalty.value * heavier
        return found
