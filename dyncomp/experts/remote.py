"""Dispatches to experts that lie on other devices; see `dyncomp.experts.exchange`.

The same plan gives the same output and gradients as `dyncomp.core.dispatch` does on one device.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core import dispatch
from dyncomp.core.dispatch import Priority, Stats
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float, Int
from dyncomp.experts import wire
from dyncomp.experts.exchange import Layout


def capacity(
    plan: RoutePlan,
    x: Float[Array, "n d"],
    bank: Any,
    num_experts: int,
    slots: int,
    priority: Priority,
    where: Layout,
) -> tuple[Float[Array, "n o"], Stats]:
    """`dyncomp.core.dispatch.capacity` with the experts of ``where``; every device fills ``slots`` rows an expert.

    A device sends e * slots * d numbers each way whatever the routing. Experts see [e/W, W * slots, d]: shapes that do
    not depend on how many devices there are (the paper's flexible all-to-all).

    Args:
      bank: the device's own experts (and slices of their hidden units).
      slots: capacity of this device's rows; rounded up to a multiple of ``where.chunks``.
    """
    slots = -(-slots // where.chunks) * where.chunks
    far = _Far(wire.own_slices(bank, where), where)
    return dispatch.capacity(plan, x, far, num_experts, slots, priority)


@dataclasses.dataclass(frozen=True)
class _Far:
    """The bank of all experts as `dispatch.capacity` sees it; rows of an expert are computed where it lies."""

    bank: Any
    where: Layout

    def batched(self, rows: Float[Array, "e c d"]) -> Float[Array, "e c o"]:
        """c rows for each expert, in ``chunks`` pieces along c."""
        e, c, d = rows.shape
        own, pieces = e // self.where.ways, jnp.split(rows, self.where.chunks, axis=1)
        send = lambda i, piece: wire.all_to_all(
            piece.reshape(self.where.ways, own, -1, d), self.where
        )
        return jnp.concatenate(_pipeline(pieces, send, self._run), axis=1)

    def _run(self, index: int, received: Float[Array, "w e c d"]) -> Float[Array, "w_e c o"]:
        """Experts on one piece, and the way back."""
        w, e, c, _ = received.shape
        rows = wire.spread(received, self.where)  # [r w e c d]
        rows = jnp.moveaxis(rows, 2, 0).reshape(e, -1, rows.shape[-1])
        y = self.bank.batched(rows).reshape(e, self.where.slices, w, c, -1)
        y = wire.collect(jnp.moveaxis(y, 0, 2), self.where)
        return wire.all_to_all(y, self.where).reshape(w * e, c, -1)


def _pipeline(pieces: list[Any], send: Any, run: Any) -> list[Any]:
    """``run(i, send(i, piece))`` of every piece; piece i + 1 is sent while piece i is computed.

    The barrier lets no piece go before the one before it has come: left alone the compiler sends all of them first.
    """
    received, outputs = send(0, pieces[0]), []
    for index in range(len(pieces)):
        following = None
        if index + 1 < len(pieces):
            piece, received = lax.optimization_barrier((pieces[index + 1], received))
            following = send(index + 1, piece)
        outputs.append(run(index, received))
        received = following
    return outputs


def dropless(
    plan: RoutePlan, x: Float[Array, "n d"], bank: Any, num_experts: int, where: Layout
) -> tuple[Float[Array, "n o"], Stats]:
    """`dyncomp.core.dispatch.dropless` with the experts of ``where``.

    Where the platform has a ragged all-to-all (TPU, GPU), exactly the kept slots travel; elsewhere every pair of
    devices exchanges `Layout.pair_slots` rows. Both need room for W * pair_slots rows.

    Returns:
      Output, and what this device ran; with ``pair_factor`` the slots that found no place are dropped.
    """
    n, k = plan.experts.shape
    width, dropped = where.pair_slots(n, k, num_experts), jnp.int32(0)
    if where.pair_factor is not None:
        plan, dropped = _limited(plan, num_experts // where.ways, where.ways, width)
    order, place, sizes = dispatch.sort_slots(plan, num_experts)
    order = order[: plan.bound]
    place = jnp.minimum(place, order.shape[0] - 1)
    rows = dispatch.take(x, order // k, place.reshape(n, k), plan.keep)
    outputs, executed = _grouped(rows, sizes, wire.own_slices(bank, where), where, width)
    real = plan.keep.reshape(-1)[order][:, None]
    slots = dispatch.take(outputs, place, order[:, None], real).reshape(n, k, -1)
    return dispatch.combine(slots, plan), Stats(executed, dropped)


def _limited(plan: RoutePlan, own: int, ways: int, width: int) -> tuple[RoutePlan, Array]:
    """At most ``width`` slots to one device, first come first served."""
    owners = dataclasses.replace(plan, experts=plan.experts // own)
    kept, dropped = dispatch.limit(owners, jnp.full((ways,), width, jnp.int32))
    return plan.only(kept.keep), dropped


def _grouped(
    rows: Float[Array, "m d"], sizes: Int[Array, "e"], bank: Any, where: Layout, width: int
) -> tuple[Float[Array, "m o"], Int[Array, ""]]:
    """Contiguous rows of each expert, computed where the experts lie; and the rows multiplied here."""
    trips = wire.trips(sizes, where, rows.shape[0], width)

    def run(index: int, received: Float[Array, "w c d"]) -> tuple[Array, Array]:
        experts = wire.spread(trips[index].experts, where).reshape(-1, 1)
        keep = experts < bank_size(bank)
        plan = RoutePlan(jnp.where(keep, experts, 0), jnp.where(keep, 1.0, 0.0), keep)
        some = wire.spread(received, where)
        y, stats = dispatch.dropless(plan, some.reshape(keep.shape[0], -1), bank, bank_size(bank))
        y = wire.collect(y.reshape(*some.shape[:-1], -1), where)
        return wire.back(trips[index].route, y, trips[index].sizes), stats.executed

    send = lambda index, piece: wire.there(trips[index].route, piece, trips[index].sizes)
    pieces = _pipeline([rows] * where.chunks, send, run)
    outputs, executed = (functools.reduce(jnp.add, parts) for parts in zip(*pieces, strict=True))
    return outputs, wire.count_once(executed, where)


def bank_size(bank: Any) -> int:
    """Experts in a bank."""
    return jax.tree.leaves(bank)[0].shape[0]
