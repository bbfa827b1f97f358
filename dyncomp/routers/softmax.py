"""Token-choice routers on softmax scores."""

import math

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
from dyncomp.routers.losses import balance_loss, entropy_loss, z_loss


class Softmax(nn.Module):
    """Base: a linear score over experts without bias, in float32, and the three losses every softmax router reports.

    Attributes:
      num_experts: e.
      dtypes: only ``accum`` matters: routing is float32.
    """

    num_experts: int
    dtypes: DTypes = DTypes()

    def check(self) -> None:
        """Refuses options that make no sense; called before anything is traced."""
        if self.num_experts < 1:
            raise DyncompError(
                f"{type(self).__name__}.num_experts={self.num_experts}: use 1 or more"
            )

    def choose(self, probabilities: Float[Array, "n e"]) -> RoutePlan:
        """The plan for given probabilities."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], mask: Array | None = None, train: bool = False
    ) -> tuple[RoutePlan, dict[str, Float[Array, ""]]]:
        """Plan and raw losses ("balance", "entropy", "z").

        Args:
          x: rows, any float dtype.
          mask: [n], 0 for padding; such rows use no expert and count in no loss.
        """
        self.check()
        init = nn.initializers.normal(0.02)
        kernel = param(self, "kernel", init, (x.shape[-1], self.num_experts), ("embed", "router"))
        logits = jnp.dot(x.astype(jnp.float32), kernel.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        plan = self.choose(probabilities)
        plan = plan if mask is None else plan.masked(mask)
        losses = {
            "balance": balance_loss(probabilities, plan, mask),
            "entropy": entropy_loss(logits, mask),
            "z": z_loss(logits, mask),
        }
        return plan, losses

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of scoring one row."""
        return {"rows": Cost(2 * d_model * self.num_experts, 4 * (d_model + self.num_experts))}


class TopK(Softmax):
    """A fixed number of experts per row (Shazeer et al. 2017).

    Attributes:
      k: experts per row.
      renormalize: divide the chosen probabilities by their sum, so that gates add up to 1.
    """

    k: int = 2
    renormalize: bool = True

    def check(self) -> None:
        """Refuses a k outside 1..e."""
        super().check()
        if not 1 <= self.k <= self.num_experts:
            raise DyncompError(
                f"TopK.k={self.k} with num_experts={self.num_experts}: use 1..{self.num_experts}"
            )

    def choose(self, probabilities: Float[Array, "n e"]) -> RoutePlan:
        """The k most probable experts."""
        return choose.top_k(probabilities, self.k, renormalize=self.renormalize)


class TopP(Softmax):
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

    def choose(self, probabilities: Float[Array, "n e"]) -> RoutePlan:
        """The nucleus of each row."""
        p = self.variable("controls", "p", lambda: jnp.float32(self.p)).value
        return choose.top_p(probabilities, jnp.minimum(p, self.max_p), max_slots=self.slots)
