"""Token-choice routers on softmax scores: a fixed number of experts, a probability mass, or a threshold."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from dyncomp.core import choose
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float
from dyncomp.routers.base import Noise, Scored


class TopK(Scored):
    """A fixed number of experts per row (Shazeer et al. 2017).

    Attributes:
      k: experts per row.
      renormalize: divide the chosen probabilities by their sum, so that gates add up to 1: the softmax over the chosen
        logits (GShard, Mixtral). Without it gates are raw probabilities (Switch, V-MoE).
      null_experts: how many of the last experts stand for "nothing": a row may choose one, but its gate is 0 and the
        renormalised gates of the others add up to 1 (the released code of MoE++).
    """

    k: int = 2
    renormalize: bool = True
    null_experts: int = 0

    def check(self) -> None:
        """Refuses a k outside 1..e, and a gate that would be constant."""
        super().check()
        if not 1 <= self.k <= self.num_experts:
            raise DyncompError(
                f"{type(self).__name__}.k={self.k} with num_experts={self.num_experts}: use 1..{self.num_experts}"
            )
        if not 0 <= self.null_experts <= self.num_experts:
            raise DyncompError(
                f"TopK.null_experts={self.null_experts} with num_experts={self.num_experts}"
            )

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """The k most probable experts."""
        del mask, train
        probabilities = jax.nn.softmax(logits, axis=-1)
        plan = choose.top_k(probabilities, self.k)
        gates = plan.weights
        if self.null_experts:
            gates = jnp.where(plan.experts < self.num_experts - self.null_experts, gates, 0.0)
        if self.renormalize:
            total = jnp.sum(gates, axis=-1, keepdims=True)
            gates = gates / jnp.where(total > 0, total, 1.0)
        return RoutePlan(plan.experts, gates, plan.keep, plan.weights[:, 0])


class Switch(TopK):
    """One expert per row, its gate the raw probability, with jittered inputs (Fedus et al. 2021).

    The gate is never renormalised: it would be the constant 1 and the router would learn from no loss but its own.
    """

    k: int = 1
    renormalize: bool = False
    jitter: float = 1e-2


class NoisyTopK(TopK):
    """The k highest logits after learned noise, gates their softmax (Shazeer et al. 2017, eq. 3-5)."""

    noise: Noise = "learned"


class RandomSecond(TopK):
    """Two experts; while training the second stays with probability 2 g_2 only (GShard, Lepikhin et al. 2020, alg. 1).

    g_2 <= 1/2 is its renormalised gate. The first gate is not renormalised again when the second goes.
    """

    def check(self) -> None:
        """Refuses another k."""
        super().check()
        if self.k != 2:
            raise DyncompError(f"RandomSecond.k={self.k}: use 2")

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """Both, or the first alone."""
        plan = super().choose(logits, mask, train)
        if not train:
            return plan
        drawn = jax.random.uniform(self.make_rng("router"), plan.weights.shape[:1])
        second = plan.weights[:, 1] / jnp.sum(plan.weights, axis=-1)
        keep = jnp.stack([jnp.ones_like(drawn, bool), drawn < 2 * second], axis=-1)
        return plan.only(keep)


class TopP(Scored):
    """The fewest experts whose probability mass exceeds p, with raw probabilities as gates (arXiv 2403.07652).

    The k most probable of e experts hold at least k / e of the mass, so a row never needs more than
    floor(p e) + 1 slots: ``max_p`` bounds the plan without ever truncating it.

    Attributes:
      p: initial value of the control ``p``, a run-time argument: changing it recompiles nothing.
      max_p: the largest value the control may take; larger ones act like it.
    """

    p: float = 0.4
    max_p: float = 1.0

    def check(self) -> None:
        """Refuses thresholds outside [0, 1]."""
        super().check()
        if not 0 <= self.p <= self.max_p <= 1:
            raise DyncompError(
                f"TopP: need 0 <= p <= max_p <= 1, got p={self.p}, max_p={self.max_p}"
            )

    @property
    def slots(self) -> int:
        """Slots of the plan: floor(max_p e) + 1, at most e."""
        return min(self.num_experts, math.floor(self.max_p * self.num_experts) + 1)

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """The nucleus of each row."""
        del mask, train
        p = self.variable("controls", "p", lambda: jnp.float32(self.p)).value
        probabilities = jax.nn.softmax(logits, axis=-1)
        plan = choose.top_p(probabilities, jnp.minimum(p, self.max_p), max_slots=self.slots)
        return RoutePlan(plan.experts, plan.weights, plan.keep, plan.weights[:, 0])


class Threshold(Scored):
    """Every expert whose probability is above a threshold; possibly none. Gates are raw probabilities.

    Attributes:
      theta: initial value of the control ``theta``, a run-time argument.
      empty: what a row without any expert above the threshold uses: "none" or its "best".
    """

    theta: float = 0.2
    empty: Literal["none", "best"] = "none"

    def check(self) -> None:
        """Refuses thresholds outside [0, 1]."""
        super().check()
        if not 0 <= self.theta <= 1 or self.empty not in ("none", "best"):
            raise DyncompError(
                f"Threshold: need 0 <= theta <= 1 and empty='none' or 'best', got {self.theta}, {self.empty!r}"
            )

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """All above the threshold, best first."""
        del mask, train
        theta = self.variable("controls", "theta", lambda: jnp.float32(self.theta)).value
        weights, experts = choose.ranked(jax.nn.softmax(logits, axis=-1))
        keep = weights > theta
        if self.empty == "best":
            keep = keep.at[:, 0].set(True)
        return RoutePlan(experts, jnp.where(keep, weights, 0.0), keep, weights[:, 0])
