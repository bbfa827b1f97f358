"""A mixture of experts on the ffn seam: any router, any dispatch."""

import math
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core import dispatch
from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import local_op, param
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.experts.bank import SwiGLUBank

Dispatch = Literal["dropless", "mask", "capacity", "gather"]
_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))


class MoE(nn.Module):
    """Routes each token to some of e SwiGLU experts and adds up their weighted outputs.

    Events: ``router/rows`` and ``experts/rows`` (row-expert pairs; executed ones include block padding, unused
    capacity and masked work). Plans (captured): ``route``, and ``load`` int32 [e], the rows each expert is chosen for.

    Attributes:
      router: factory, called with ``num_experts``.
      num_experts: e.
      hidden: f of each expert.
      dispatch: "dropless" (kept slots only), "mask" (everything; the reference), "capacity" (drops above
        ``capacity_factor`` times an even share), "gather" (few rows).
      capacity_factor: slots of an expert as a multiple of rows x slots / experts.
    """

    router: Factory
    num_experts: int
    hidden: int
    dispatch: Dispatch = "dropless"
    capacity_factor: float = 1.25
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Applies the mixture to every position; padding uses no expert."""
        check_factory(self.router, "MoE.router")
        if self.dispatch not in ("dropless", "mask", "capacity", "gather"):
            raise DyncompError(
                f"MoE.dispatch={self.dispatch!r}: use 'dropless', 'mask', 'capacity' or 'gather'"
            )
        b, t, d = x.shape
        rows = x.reshape(b * t, d)
        row_mask = None if mask is None else mask.reshape(b * t)
        router = self.router(name="router", num_experts=self.num_experts, dtypes=self.dtypes)
        plan, losses = router(rows, row_mask, train)
        y, executed, dropped = self._run(plan.experts, plan.weights, plan.keep, rows, self._bank(d))
        seen = b * t if row_mask is None else jnp.sum(row_mask.astype(bool), dtype=jnp.int32)
        events = {
            "router": {"rows": count(seen, b * t)},
            "experts": {"rows": count(jnp.sum(plan.keep, dtype=jnp.int32) - dropped, executed)},
        }
        plans = {}
        if "plan" in capture:
            plans = {"route": plan, "load": plan.load(self.num_experts)}
        return y.reshape(b, t, d), Aux(losses, events, plans)

    def _bank(self, d: int) -> tuple[Array, Array, Array]:
        e, f, dtype = self.num_experts, self.hidden, self.dtypes.param
        wide, narrow = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        gate = param(self, "gate", _INIT, (e, d, f), wide, dtype)
        up = param(self, "up", _INIT, (e, d, f), wide, dtype)
        return gate, up, param(self, "down", _INIT, (e, f, d), narrow, dtype)

    def _run(self, experts, weights, keep, rows, bank) -> tuple[Array, Array, Array]:
        """Dispatch and experts, on each device's own rows under a mesh (weights gathered whole)."""

        def local(experts, weights, keep, rows, gate, up, down):
            plan = RoutePlan(experts, weights, keep)
            cast = SwiGLUBank(*(w.astype(rows.dtype) for w in (gate, up, down)))
            y, stats = self._dispatch(plan, rows, cast)
            return y, stats.executed[None], stats.dropped[None]

        row, whole = ("rows", None), (None, None, None)
        run = local_op(
            local, [row, row, row, row, whole, whole, whole], (row, ("rows",), ("rows",))
        )
        y, executed, dropped = run(experts, weights, keep, rows, *bank)
        total = lambda counts: jnp.sum(counts, dtype=jnp.int32)  # noqa: E731
        return y, total(executed), total(dropped)

    def _dispatch(self, plan: RoutePlan, rows: Array, bank: SwiGLUBank):
        if self.dispatch != "capacity":
            return getattr(dispatch, self.dispatch)(plan, rows, bank, self.num_experts)
        even = rows.shape[0] * plan.experts.shape[1] / self.num_experts
        slots = max(1, math.ceil(self.capacity_factor * even))
        return dispatch.capacity(plan, rows, bank, self.num_experts, min(slots, rows.shape[0]))

    def cost(self, d_model: int) -> dict[str, dict[str, Cost]]:
        """Prices of scoring a row and of one row through one expert."""
        router = self.router(parent=None, num_experts=self.num_experts, dtypes=self.dtypes)
        moved = (2 * d_model + self.hidden) * self.dtypes.compute_itemsize
        experts = {"rows": Cost(6 * d_model * self.hidden, moved)}
        return {"router": router.cost(d_model), "experts": experts}
