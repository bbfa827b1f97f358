"""A router that explores at random, then mixes softly and hardens, and at last decides."""

import jax
import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float
from dyncomp.routers.base import Scored


class Annealed(Scored):
    """One alternative per row: uniformly random, then a soft mixture, in evaluation the best (Duo-LLM's stages 1, 3).

    For ``explore_steps`` training steps each row takes one alternative at random with gate 1, so that alternatives
    become interchangeable. Then every row takes all of them, weighted softmax(s h), while s grows log-linearly from
    ``start`` to ``end`` within ``anneal_steps`` steps. In evaluation the row takes argmax h with gate 1. (The notes on
    the paper let a *temperature* rise, which hardens only if it multiplies the logits, as s does.)

    Losses: those of every router, and ``share``, the mean soft weight of alternative 0: a budget holds it
    (`LMObjective.budgets`). The control ``steps`` float32 counts training steps and is saved with the state.

    Attributes:
      explore_steps, anneal_steps, start, end: the schedule.
    """

    explore_steps: int = 0
    anneal_steps: int = 100
    start: float = 1.0
    end: float = 20.0

    def check(self) -> None:
        """Refuses a schedule that does not harden."""
        super().check()
        if self.explore_steps < 0 or self.anneal_steps < 1 or not 0 < self.start <= self.end:
            raise DyncompError(
                f"Annealed: explore_steps={self.explore_steps} >= 0, anneal_steps={self.anneal_steps} >= 1 and"
                f" 0 < start={self.start} <= end={self.end} are needed"
            )

    def sharpness(self, steps: Float[Array, ""]) -> Float[Array, ""]:
        """s after so many training steps."""
        done = jnp.clip((steps - self.explore_steps) / self.anneal_steps, 0.0, 1.0)
        return jnp.float32(self.start) * jnp.float32(self.end / self.start) ** done

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """All alternatives in index order; those with weight 0 are not kept."""
        del mask
        n, e = logits.shape
        steps = self.variable("controls", "steps", lambda: jnp.float32(0))
        hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), e)
        weights = hard
        if train:
            drawn = jax.random.randint(self.make_rng("router"), (n,), 0, e)
            soft = jax.nn.softmax(logits * self.sharpness(steps.value), axis=-1)
            explores = steps.value < self.explore_steps
            weights = jnp.where(explores, jax.nn.one_hot(drawn, e), soft)
            if self.is_mutable_collection("controls") and not self.is_initializing():
                steps.value = steps.value + 1
        experts = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32), (n, e))
        return RoutePlan(experts, weights, weights > 0)

    def _losses(self, logits, noisy, std, plan, mask):
        weights = plan.weights[:, 0]
        real = jnp.ones_like(weights) if mask is None else mask.astype(jnp.float32)
        share = jnp.sum(weights * real) / jnp.maximum(jnp.sum(real), 1.0)
        return {**super()._losses(logits, noisy, std, plan, mask), "share": share}
