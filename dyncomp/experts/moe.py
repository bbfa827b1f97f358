"""A mixture of experts on the ffn seam: any router, any bank of experts, any dispatch."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core import dispatch
from dyncomp.core.aux import Aux, count
from dyncomp.core.dispatch import Priority
from dyncomp.core.dtypes import DTypes, widened
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.experts import remote
from dyncomp.experts.bank import SwiGLUBank
from dyncomp.experts.capacity import Rounding, heterogeneous_slots, slots_per_expert
from dyncomp.experts.exchange import Exchange, Layout, layout
from dyncomp.experts.free import FreeExperts, Kind, check_kinds
from dyncomp.experts.local import on_own_rows

Dispatch = Literal["dropless", "mask", "capacity", "gather"]


class MoE(nn.Module):
    """Routes each token to some of e experts and adds up their weighted outputs.

    Events: ``router/rows``; ``experts/rows`` (row-expert pairs; executed ones include block padding, unused capacity
    and masked work); ``dropped/rows`` (free of charge) where a capacity limits; ``free/rows`` and ``shared/tokens``
    where there are such experts. Plans (captured): ``route`` (slots of experts with a network), ``load`` int32 [e]
    (rows each expert is chosen for, free ones last) and ``free`` float32 [n free] (the gates of free experts).

    Attributes:
      router: factory, called with ``num_experts``, those without a network included.
      num_experts: experts with a network; their indices come first.
      hidden: f of each.
      bank: class of the experts' weights, `SwiGLUBank` or `MLPBank`.
      free: kinds of the experts without a network, in the order of their indices (`FreeExperts`).
      free_weight: tau of MoE++: how much less than a network a free expert weighs, in the router's heterogeneous loss
        and in capacities; networks weigh tau, free experts 1 in a capacity, and the other way round in the loss.
      shared: factory of a unit on the ffn seam that every token passes (DeepSeekMoE); None for none.
      shared_gate: scale the shared unit's output by sigmoid(x w) (Qwen2-MoE).
      dispatch: "dropless" (kept slots only), "mask" (everything; the reference), "capacity" (drops what is above
        `capacity.slots_per_expert`), "gather" (few rows).
      capacity_factor, capacity_counts_k, capacity_rounding, capacity_multiple: see `capacity.slots_per_expert`.
      capacity_slots: slots per expert and device; None follows the factor.
      priority: who is dropped last, see `dyncomp.core.dispatch.Priority`.
      exchange: with experts split over devices, what moves between them under "dropless" and "capacity"; the other
        dispatches gather all weights on every device.
    """

    router: Factory
    num_experts: int
    hidden: int
    bank: Any = SwiGLUBank
    free: Sequence[Kind] = ()
    free_weight: float = 1.0
    shared: Factory | None = None
    shared_gate: bool = False
    dispatch: Dispatch = "dropless"
    capacity_factor: float = 1.25
    capacity_counts_k: bool = True
    capacity_rounding: Rounding = "up"
    capacity_multiple: int = 1
    capacity_slots: int | None = None
    priority: Priority = "row"
    exchange: Exchange = Exchange()
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        below: dict[str, Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Applies the mixture to every position; padding uses no expert.

        ``below`` holds what the layer below hands up for the router, leaves [b t ...]; see `below_like`.
        """
        self._check()
        b, t, d = x.shape
        rows = x.reshape(b * t, d)
        row_mask = None if mask is None else mask.reshape(b * t)
        plan, losses, up = self._route(rows, row_mask, train, below, (b, t))
        plan, limited = self._limited(plan)
        own = plan.only(plan.experts < self.num_experts) if self.free else plan
        y, executed, dropped = self._run(own, rows, self.bank.create(self, *self._sizes(d)))
        seen = b * t if row_mask is None else jnp.sum(row_mask.astype(bool), dtype=jnp.int32)
        needed = jnp.sum(own.keep, dtype=jnp.int32) - dropped
        events: dict[str, Any] = {
            "router": {"rows": count(seen, b * t)},
            "experts": {"rows": count(needed, executed)},
        }
        if self._limits:
            events["dropped"] = {"rows": count(dropped + limited)}
        if self.free:
            y = y + self._free()(rows, plan)
            events["free"] = {"rows": count(seen, b * t)}
        y = y.reshape(b, t, d)
        if self.shared is not None:
            more, aux = self._shared(x, mask, train)
            y, events["shared"] = y + more, aux.events
        plans: dict[str, Any] = {}
        if "plan" in capture:
            plans = {"route": own, "load": plan.load(self.total)}
            if self.free:
                plans["free"] = plan.one_hot(self.total)[:, self.num_experts :]
        return y, Aux(losses, events, plans, below=up)

    @property
    def total(self) -> int:
        """All experts, those without a network included."""
        return self.num_experts + len(self.free)

    @property
    def _limits(self) -> bool:
        return self.dispatch == "capacity" or self.exchange.pair_factor is not None

    def _sizes(self, d: int) -> tuple[int, int, int, str]:
        return self.num_experts, d, self.hidden, self.dtypes.param

    def _check(self) -> None:
        check_factory(self.router, "MoE.router")
        check_kinds(self.free)
        if self.dispatch not in ("dropless", "mask", "capacity", "gather"):
            raise DyncompError(
                f"MoE.dispatch={self.dispatch!r}: use 'dropless', 'mask', 'capacity' or 'gather'"
            )
        if self.num_experts < 1 or self.hidden < 1:
            raise DyncompError(
                f"MoE: num_experts={self.num_experts}, hidden={self.hidden}; use 1 or more"
            )
        if self.capacity_factor <= 0 or self.free_weight <= 0 or self.capacity_multiple < 1:
            raise DyncompError(
                f"MoE: capacity_factor={self.capacity_factor}, free_weight={self.free_weight} and"
                f" capacity_multiple={self.capacity_multiple} must be positive"
            )
        if self.priority not in ("row", "choice", "score"):
            raise DyncompError(f"MoE.priority={self.priority!r}: use 'row', 'choice' or 'score'")

    def _router(self, **kwargs: Any) -> Any:
        if self.free:
            weights = (1.0,) * self.num_experts + (self.free_weight,) * len(self.free)
            kwargs["balance_weights"] = weights
        return self.router(num_experts=self.total, dtypes=self.dtypes, **kwargs)

    def _free(self, **kwargs: Any) -> FreeExperts:
        kwargs.setdefault("name", "free")
        return FreeExperts(tuple(self.free), self.num_experts, self.dtypes, **kwargs)

    def _route(self, rows, mask, train, below, shape) -> tuple[RoutePlan, Any, dict[str, Array]]:
        """Plan, losses and what goes up."""
        router = self._router(name="router")
        wanted = self.below_like(1, 1)
        if not wanted:
            return (*router(rows, mask, train), {})
        flat = None
        if below is not None:
            flat = {n: below[n].reshape(-1, *below[n].shape[2:]) for n in wanted}
        plan, losses, *rest = router(rows, mask, train, flat)
        up = rest[0] if rest else {}
        return plan, losses, {n: v.reshape(*shape, *v.shape[1:]) for n, v in up.items()}

    def below_like(self, batch: int, length: int) -> dict[str, Array]:
        """What the router wants handed up from the layer below, as the first layer sees it; leaves [b t ...]."""
        like = getattr(self._router(parent=None), "below_like", None)
        found = {} if like is None else like(batch * length)
        return {n: v.reshape(batch, length, *v.shape[1:]) for n, v in found.items()}

    def _shared(self, x, mask, train) -> tuple[Array, Aux]:
        check_factory(self.shared, "MoE.shared")
        y, aux = self.shared(name="shared", dtypes=self.dtypes)(x, mask, train=train)  # type: ignore[misc]
        if self.shared_gate:
            zeros = nn.initializers.zeros_init()
            wide, axes = widened(x), ("embed", "router")
            shape, dtype = (x.shape[-1], 1), wide.dtype.name
            gate = param(self, "shared_gate", zeros, shape, axes, dtype)
            score = jnp.einsum("btd,do->bto", wide, widened(gate))
            y = y * jax.nn.sigmoid(score).astype(y.dtype)
        return y, aux

    def _limited(self, plan: RoutePlan) -> tuple[RoutePlan, Array]:
        """With free experts under a capacity: the plan without what is dropped, and how many slots that are."""
        if not self.free or self.dispatch != "capacity":
            return plan, jnp.int32(0)
        slots = jnp.asarray(self._mixed(plan.keep.size), jnp.int32)
        return dispatch.limit(plan, slots, self.priority)

    def _mixed(self, assignments: int) -> tuple[int, ...]:
        weights = (self.free_weight,) * self.num_experts + (1.0,) * len(self.free)
        return heterogeneous_slots(assignments, weights, self.capacity_factor)

    def _run(self, plan: RoutePlan, rows: Array, bank: Any) -> tuple[Array, Array, Array]:
        """Output, executed and dropped rows; under a mesh rows or weights travel (`Exchange`)."""
        travels = self.dispatch in ("dropless", "capacity")
        where = layout(self.exchange, self.num_experts) if travels else None
        axes = [bank.axes[field.name] for field in dataclasses.fields(bank)]

        def run(plan: RoutePlan, rows: Array, bank: Any) -> tuple[Array, Array, Array]:
            y, stats = self._dispatch(plan, rows, bank, where)
            return y, stats.executed, stats.dropped

        names = [where.names(names) for names in axes] if where else None
        y, executed, dropped = on_own_rows(run, plan, rows, bank, names, counts=2)
        return y, executed, dropped

    def _dispatch(self, plan: RoutePlan, rows: Array, bank: Any, where: Layout | None = None):
        if self.dispatch == "dropless" and where:
            return remote.dropless(plan, rows, bank, self.num_experts, where)
        if self.dispatch != "capacity":
            return getattr(dispatch, self.dispatch)(plan, rows, bank, self.num_experts)
        n, k = plan.experts.shape
        slots = self._mixed(n * k)[0] if self.free else self.slots(n, k)
        args = plan, rows, bank, self.num_experts, min(slots, n), self.priority
        return remote.capacity(*args, where) if where else dispatch.capacity(*args)

    def slots(self, rows: int, k: int) -> int:
        """Rows an expert takes at most under the capacity dispatch, of ``rows`` with k choices each."""
        if self.capacity_slots is not None:
            return self.capacity_slots
        return slots_per_expert(
            rows,
            self.num_experts,
            k,
            self.capacity_factor,
            counts_k=self.capacity_counts_k,
            rounding=self.capacity_rounding,
            multiple=self.capacity_multiple,
        )

    def cost(self, d_model: int) -> dict[str, dict[str, Cost]]:
        """Prices of scoring a row, of one row through one expert, and of what every row passes."""
        table = {
            "router": self._router(parent=None).cost(d_model),
            "experts": {"rows": self.bank.cost(d_model, self.hidden, self.dtypes)},
        }
        if self._limits:
            table["dropped"] = {"rows": Cost(0)}
        if self.free:
            table["free"] = {"rows": self._free(parent=None, name=None).cost(d_model)}
        if self.shared is not None:
            table["shared"] = self.shared(parent=None, dtypes=self.dtypes).cost(d_model)
        return table
