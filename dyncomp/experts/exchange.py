"""Expert parallelism: rows travel to the devices that hold their experts, and back (an all-to-all each way).

Pure functions, called inside a `dyncomp.core.sharding.local_op` on a device's own rows and its own experts. W devices
of the mesh axis ``expert`` hold e/W experts each; G devices of the axis ``tensor`` share an expert, each with a slice
of its hidden units. The parameters lie the same way whatever `Exchange` says, so steps compiled for different ones may
follow each other without moving a weight (Hwang et al. 2023, arXiv 2206.03382, sec. 3.1).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core import dispatch
from dyncomp.core.dispatch import Priority, Stats
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import current_mesh, to_spec
from dyncomp.core.typing import Array, Float, Int
from dyncomp.experts import wire


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """What moves between the devices that share a layer's experts.

    Attributes:
      slices: r. 0: weights move (every device gathers all experts; nothing else is used then). 1: rows move, and the
        slices of an expert's hidden units are gathered. r > 1, a divisor of G: rows move and are repeated on r devices,
        each with its part of the hidden units, and the results summed. None: all G, no weight moves at all.
      chunks: d, pieces of the rows; the exchange of one piece may overlap the experts of another. A capacity is rounded
        up to a multiple of it.
      inner: devices that are near each other: above 1 the all-to-all goes in two steps, inside groups of this many
        neighbours and then between groups (2DH): larger messages, twice the volume.
      pair_factor: without a capacity, rows that one device may send to another, as a multiple of the even share;
        what is above is dropped and counted. None: as many as there can be, nothing is dropped.
    """

    slices: int | None = None
    chunks: int = 1
    inner: int = 1
    pair_factor: float | None = None

    def __post_init__(self):
        if (self.slices or 0) < 0 or self.chunks < 1 or self.inner < 1:
            raise DyncompError(
                f"Exchange: slices={self.slices} must be 0 or more, chunks={self.chunks} and"
                f" inner={self.inner} 1 or more"
            )
        if self.pair_factor is not None and self.pair_factor <= 0:
            raise DyncompError(f"Exchange.pair_factor={self.pair_factor}: use None or more than 0")


@dataclasses.dataclass(frozen=True)
class Layout:
    """An `Exchange` on a mesh.

    Attributes:
      axis, ways: mesh axis of the experts and its size W.
      group_axis, group: mesh axis of the hidden units and its size G.
      slices: r, from 1 to G.
      chunks, inner, pair_factor: as in `Exchange`.
    """

    axis: Any
    ways: int
    group_axis: Any = None
    group: int = 1
    slices: int = 1
    chunks: int = 1
    inner: int = 1
    pair_factor: float | None = None

    def names(self, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
        """How a parameter with logical ``axes`` comes into the `local_op`: split by expert and perhaps hidden unit."""
        kept = ("expert", "mlp") if self.slices > 1 else ("expert",)
        return tuple(name if name in kept else None for name in axes)

    def pair_slots(self, rows: int, k: int, num_experts: int) -> int:
        """B: rows that one device may send to another, of ``rows`` with k choices each; a multiple of ``chunks``."""
        most = rows * min(k, num_experts // self.ways)
        if self.pair_factor is not None:
            most = min(most, math.ceil(self.pair_factor * rows * k / self.ways))
        return -(-most // self.chunks) * self.chunks


def layout(options: Exchange, num_experts: int) -> Layout | None:
    """Where experts lie on the current mesh; None where weights move: one device on their axis, or ``slices`` 0.

    Raises:
      DyncompError: sizes that do not divide each other.
    """
    mesh = current_mesh()
    if mesh is None or mesh.manual_axes or options.slices == 0:
        return None
    size = lambda axes: math.prod(
        mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())
    )
    axis, group_axis = to_spec(("expert",))[0], to_spec(("mlp",))[0]
    ways, group = size(axis), size(group_axis)
    if ways == 1:
        return None
    slices = group if options.slices is None else options.slices
    if num_experts % ways:
        raise DyncompError(f"{num_experts} experts on {ways} devices: use a divisor for the axis")
    if group % slices:
        raise DyncompError(
            f"Exchange.slices={slices} does not divide the {group} devices of axis {group_axis!r}"
        )
    if ways % options.inner:
        raise DyncompError(f"Exchange.inner={options.inner} does not divide {ways} devices")
    return Layout(
        axis, ways, group_axis, group, slices, options.chunks, options.inner, options.pair_factor
    )


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
    counts = []

    def run(index: int, received: Float[Array, "w c d"]) -> Float[Array, "m o"]:
        experts = wire.spread(trips[index].experts, where).reshape(-1, 1)
        keep = experts < bank_size(bank)
        plan = RoutePlan(jnp.where(keep, experts, 0), jnp.where(keep, 1.0, 0.0), keep)
        some = wire.spread(received, where)
        y, stats = dispatch.dropless(plan, some.reshape(keep.shape[0], -1), bank, bank_size(bank))
        counts.append(stats.executed)
        y = wire.collect(y.reshape(*some.shape[:-1], -1), where)
        return wire.back(trips[index].route, y, trips[index].sizes)

    send = lambda index, piece: wire.there(trips[index].route, piece, trips[index].sizes)
    outputs = sum(_pipeline([rows] * where.chunks, send, run))
    return outputs, wire.count_once(sum(counts), where)


def bank_size(bank: Any) -> int:
    """Experts in a bank."""
    return jax.tree.leaves(bank)[0].shape[0]
