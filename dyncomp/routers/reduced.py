"""Routing over experts that were merged, pruned or are skipped: section E of the survey arXiv 2412.14219."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core import choose
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.routers.softmax import TopK


def grouped_plan(plan: RoutePlan, table: Int[Array, "e"]) -> RoutePlan:
    """A plan over old experts as one over groups: ``table[i]`` is expert i's group; gates in one group add up.

    The first slot of a group carries the sum, later ones are not kept, so a row runs each group once.
    """
    groups = table[plan.experts].astype(jnp.int32)
    same = (groups[:, :, None] == groups[:, None, :]) & plan.keep[:, None, :]
    first = jnp.argmax(same, axis=-1) == jnp.arange(groups.shape[1])[None]
    weights = jnp.sum(jnp.where(same, plan.weights[:, None, :], 0.0), axis=-1)
    keep = plan.keep & first
    return RoutePlan(groups, jnp.where(keep, weights, 0.0), keep, plan.priority, plan.bound)


class Grouped(nn.Module):
    """Any router over the experts before they were merged, its choice mapped to the merged ones.

    Attributes:
      num_experts: g, the merged experts.
      router: factory of the old router; its parameters lie under ``router``.
      old_experts: e. The control ``table`` int32 [e] holds the group of each; at first e * i // g.
    """

    num_experts: int
    router: Factory
    old_experts: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], mask: Array | None = None, train: bool = False
    ) -> tuple[RoutePlan, Any]:
        """The mapped plan and the old router's losses."""
        check_factory(self.router, "Grouped.router")
        if not 1 <= self.num_experts <= self.old_experts:
            raise DyncompError(
                f"Grouped: num_experts={self.num_experts} must be 1..old_experts={self.old_experts}"
            )
        plan, losses = self._old(name="router")(x, mask, train)
        start = jnp.arange(self.old_experts, dtype=jnp.int32) * self.num_experts // self.old_experts
        table = self.variable("controls", "table", lambda: start).value
        return grouped_plan(plan, table), losses

    def _old(self, **kwargs: Any) -> Any:
        return self.router(num_experts=self.old_experts, dtypes=self.dtypes, **kwargs)

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of the old router."""
        return self._old(parent=None).cost(d_model)


class PrunedTopK(TopK):
    """Top-k among the experts that the control ``allowed`` (bool [e], all at first) leaves.

    The others' logits are -inf before the softmax, so raw probabilities grow: logits 2, 1, 0, -1 without the last give
    .665 in the place of .644.

    Attributes:
      keep_denominator: take the softmax over all experts and only choose among the allowed; with ``renormalize`` it
        makes no difference. A row never gets more slots than there are allowed experts.
    """

    keep_denominator: bool = False

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """The k most probable allowed experts."""
        del mask, train
        start = lambda: jnp.ones((self.num_experts,), bool)
        allowed = self.variable("controls", "allowed", start).value[None]
        masked = jnp.where(allowed, logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits if self.keep_denominator else masked, axis=-1)
        experts = choose.top_k(jnp.where(allowed, probabilities, -1.0), self.k).experts
        keep = jnp.take_along_axis(jnp.broadcast_to(allowed, logits.shape), experts, axis=-1)
        gates = jnp.where(keep, jnp.take_along_axis(probabilities, experts, axis=-1), 0.0)
        first = gates[:, 0]
        if self.renormalize:
            gates = gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-20)
        return RoutePlan(experts, gates, keep, first)


class SkipSecond(TopK):
    """Top-2 that runs the second expert only where w2 >= beta * w1 (Lu et al. 2024), beta being a control.

    Attributes:
      beta: the control's first value; 0 skips nothing. `median_ratio` calibrates it, so that half the rows skip.
      keep_weight: leave w1 as it is where the second is skipped; else it becomes w1 + w2.
    """

    beta: float = 0.0
    keep_weight: bool = True

    def check(self) -> None:
        """Refuses another k and a negative beta."""
        super().check()
        if self.k != 2 or self.beta < 0:
            raise DyncompError(
                f"SkipSecond: k={self.k}, beta={self.beta}: use k=2 and a beta of 0 or more"
            )

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """Both, or the first alone."""
        beta = self.variable("controls", "beta", lambda: jnp.float32(self.beta)).value
        both = super().choose(logits, mask, train)
        first, second = both.weights[:, 0], both.weights[:, 1]
        run = second >= beta * first
        plan = both.only(jnp.stack([jnp.ones_like(run), run], axis=-1))
        if self.keep_weight:
            return plan
        whole = jnp.where(run, first, first + second)
        return dataclasses.replace(plan, weights=plan.weights.at[:, 0].set(whole))


def median_ratio(weights: Float[Array | np.ndarray, "*l n k"]) -> Float[np.ndarray, "*l"]:
    """Median over calibration rows of w2 / w1, sorted weights; one beta a layer."""
    top = np.sort(np.asarray(weights, np.float64), axis=-1)[..., ::-1]
    ratio = top[..., 1] / np.maximum(top[..., 0], 1e-30)
    return np.asarray(np.median(ratio, axis=-1), np.float32)
