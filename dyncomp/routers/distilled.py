"""A router taught by which experts come nearest to a target, and choosers that look at the outputs themselves.

For the slices of a dense network (FactorLLM, arXiv 2408.11855): the target is what the dense network puts out. These
routers are handed the outputs of all experts (`Outputs`) by the unit they sit in, `dyncomp.experts.SlicedFFN`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core import choose
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float
from dyncomp.routers.imitation import (
    Direction,
    Outputs,
    best_subset,
    imitation_loss,
    nearest_label,
    slice_errors,
    winners_loss,
)

INIT = nn.initializers.lecun_normal()


def ranked_slots(scores: Float[Array, "n e"], k: Array, slots: int) -> RoutePlan:
    """The k highest scores of each row in a plan of ``slots`` slots, weights 1; ``k`` is a run-time int32."""
    experts = choose.ranked(scores)[1][:, :slots]
    keep = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32)[None] < k, experts.shape)
    return RoutePlan(experts, keep.astype(jnp.float32), keep)


class Counted(nn.Module):
    """Base of the routers whose k is a control (int32): one compiled program serves every k.

    Attributes:
      num_experts: e.
      k: the control's first value.
      max_k: slots of the plan; larger values of the control act like it. None for e.
    """

    num_experts: int
    k: int = 2
    max_k: int | None = None
    dtypes: DTypes = DTypes()

    @property
    def slots(self) -> int:
        """Slots of the plan."""
        return self.num_experts if self.max_k is None else self.max_k

    def check(self) -> None:
        """Refuses counts outside 1 <= k <= max_k <= e."""
        if not 1 <= self.k <= self.slots <= self.num_experts:
            raise DyncompError(
                f"{type(self).__name__}: need 1 <= k={self.k} <= max_k={self.slots}"
                f" <= num_experts={self.num_experts}"
            )

    def count(self) -> Array:
        """The control, held inside 1..slots."""
        k = self.variable("controls", "k", lambda: jnp.int32(self.k)).value
        return jnp.clip(k, 1, self.slots)


class DistilledRouter(Counted):
    """The k highest of x W + b, float32; taught only by its own losses, for a choice that is hard has no gradient.

    Losses (raw, while training): ``imitation`` (`imitation_loss`) and ``winners`` (`winners_loss`); NaN in evaluation,
    where the outputs of all experts are not computed. All gates are 1: the unit that uses the plan scales.

    Attributes:
      direction: of the divergence, "router" for KL(router || label), as the paper has it, or "label".
      detach: take x as it is, so that the losses train this router alone. Without it they also move what made x.
    """

    direction: Direction = "router"
    detach: bool = True

    @staticmethod
    def reads_outputs(train: bool) -> bool:
        """Whether it wants the outputs of all experts: only to learn from."""
        return train

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n d"],
        mask: Array | None = None,
        train: bool = False,
        outputs: Outputs | None = None,
    ) -> tuple[RoutePlan, dict[str, Float[Array, ""]]]:
        """Plan and raw losses; padding rows (mask [n] 0) use nothing and count nowhere."""
        self.check()
        if self.direction not in ("router", "label"):
            raise DyncompError(
                f"DistilledRouter.direction={self.direction!r}: use 'router' or 'label'"
            )
        shape, zeros = (x.shape[-1], self.num_experts), nn.initializers.zeros_init()
        kernel = param(self, "kernel", INIT, shape, ("embed", "router"))
        bias = param(self, "bias", zeros, shape[1:], ("router",))
        x = jax.lax.stop_gradient(x) if self.detach else x
        logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32))
        logits = logits + bias.astype(jnp.float32)[None]
        k = self.count()
        plan = ranked_slots(jax.lax.stop_gradient(logits), k, self.slots)
        plan = plan if mask is None else plan.masked(mask)
        if outputs is None:
            return plan, {name: jnp.float32(jnp.nan) for name in ("imitation", "winners")}
        label = nearest_label(slice_errors(outputs, k), k)
        return plan, {
            "imitation": imitation_loss(logits, label, mask, direction=self.direction),
            "winners": winners_loss(logits, k, mask),
        }

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of scoring one row."""
        return {"rows": Cost(2 * d_model * self.num_experts, 4 * (d_model + self.num_experts))}


class Hindsight(Counted):
    """A bound, no method: chooses by the outputs of all experts, which it has to see first.

    Attributes:
      by: "slice" takes the k experts of the label, those nearest to target * k / e one by one; "subset" the set of k
        whose sum comes nearest to the target, out of all of them.
      rescale: for "subset": judge the sum times e / k.
    """

    by: Literal["slice", "subset"] = "slice"
    rescale: bool = True

    @staticmethod
    def reads_outputs(train: bool) -> bool:
        """Always."""
        return True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n d"],
        mask: Array | None = None,
        train: bool = False,
        outputs: Outputs | None = None,
    ) -> tuple[RoutePlan, dict[str, Float[Array, ""]]]:
        """The plan; reports no losses."""
        del train
        self.check()
        if self.by not in ("slice", "subset"):
            raise DyncompError(f"Hindsight.by={self.by!r}: use 'slice' or 'subset'")
        if outputs is None:
            raise DyncompError("Hindsight needs a unit that hands it outputs: use SlicedFFN")
        k = self.count()
        if self.by == "slice":
            scores = -slice_errors(outputs, k)
        else:
            scores = best_subset(outputs, k, rescale=self.rescale)
        plan = ranked_slots(scores, k, self.slots)
        return (plan if mask is None else plan.masked(mask)), {}

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Its choice is free: it stands for no computation that could be made."""
        del d_model
        return {"rows": Cost(0, 0)}
