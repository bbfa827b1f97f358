"""Plans: frozen pytrees that say what will be computed. Any dispatch, ledger or plot can read them.

Captured under a scanned group, every leaf has a leading layer axis (``*l``).
"""

import dataclasses

import jax.numpy as jnp
from flax import struct

from dyncomp.core.typing import Array, Bool, Float, Int


@struct.dataclass
class RoutePlan:
    """Which alternatives (experts) each row uses.

    Attributes:
      experts: int32 [n k], the alternative in each slot; distinct within a row where ``keep`` holds.
      weights: float32 [n k], the combine weight; gradients reach the scores through it. 0 where not kept.
      keep: bool [n k], whether the slot is used.
      priority: float32 [n], which rows come first where capacity is scarce (higher first); None for row order.
      bound: static; at most this many slots are ever kept (None: all of them). Dispatches size their buffers by it.
    """

    experts: Int[Array, "*l n k"]
    weights: Float[Array, "*l n k"]
    keep: Bool[Array, "*l n k"]
    priority: Float[Array, "*l n"] | None = None
    bound: int | None = struct.field(pytree_node=False, default=None)

    def counts(self) -> Int[Array, "n"]:
        """How many alternatives each row uses, int32."""
        return jnp.sum(self.keep, axis=-1, dtype=jnp.int32)

    def load(self, num_experts: int) -> Int[Array, "e"]:
        """How many rows each alternative gets, int32."""
        index = jnp.where(self.keep, self.experts, num_experts)
        return jnp.zeros((num_experts + 1,), jnp.int32).at[index].add(1)[:num_experts]

    def one_hot(self, num_experts: int) -> Float[Array, "n e"]:
        """Combine weights as a dense [n e] matrix (for references and pictures)."""
        rows = jnp.arange(self.experts.shape[0])[:, None]
        weights = jnp.where(self.keep, self.weights, 0.0)
        return (
            jnp.zeros((self.experts.shape[0], num_experts), weights.dtype)
            .at[rows, self.experts]
            .add(weights)
        )

    def masked(self, mask: Float[Array, "n"] | Bool[Array, "n"]) -> "RoutePlan":
        """The plan with rows of padding (mask 0) using nothing."""
        keep = self.keep & mask.astype(bool)[:, None]
        return dataclasses.replace(self, weights=jnp.where(keep, self.weights, 0.0), keep=keep)

    def only(self, served: Bool[Array, "n k"]) -> "RoutePlan":
        """The plan without the slots that are not ``served``; the other weights stay as they are."""
        keep = self.keep & served
        return dataclasses.replace(self, weights=jnp.where(keep, self.weights, 0.0), keep=keep)


@struct.dataclass
class KeepPlan:
    """Which rows stay (tokens that are not skipped, pruned or routed around).

    Attributes:
      index: int32 [k], rows that stay; where ``keep`` is False, any row.
      keep: bool [k], whether the entry is real.
      weights: float32 [k], factor on the unit's output; gradients reach the scores through it.
    """

    index: Int[Array, "*l k"]
    keep: Bool[Array, "*l k"]
    weights: Float[Array, "*l k"]


@struct.dataclass
class ExitPlan:
    """At which exit each example leaves.

    Attributes:
      exit: int32 [b]; the final classifier is the last index.
      scores: float32 [b x], the score that decided at each exit (as far as it is defined).
    """

    exit: Int[Array, "*l b"]
    scores: Float[Array, "*l b x"]

    def histogram(self, num_exits: int) -> Int[Array, "x"]:
        """How many examples leave at each exit, int32."""
        return jnp.zeros((num_exits,), jnp.int32).at[self.exit].add(1)
