"""Dispatches: pure functions that turn a plan into less work under static shapes.

All take the same plan and the same *bank* of alternatives, and give the same output and gradients whenever nothing is
dropped. Each also reports what it really ran.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import KeepPlan, RoutePlan
from dyncomp.core.typing import Array, Bool, Float, Int


@runtime_checkable
class Batched(Protocol):
    """Alternatives (experts) as a pure function of equally many rows each: all that a capacity needs."""

    def batched(self, rows: Array) -> Array:
        """[e c d] -> [e c o]: c rows for each alternative."""
        ...


@runtime_checkable
class Bank(Batched, Protocol):
    """Alternatives (experts) as pure functions of rows."""

    def grouped(self, rows: Array, group_sizes: Array) -> Array:
        """[m d], int32 [e] -> [m o]: contiguous rows of each alternative in order; rows past the last are ignored."""
        ...

    def gathered(self, rows: Array, experts: Array) -> Array:
        """[n k d], int32 [n k] -> [n k o]: each slot with its own alternative."""
        ...

    def executed(self, group_sizes: Array, rows: int) -> Array:
        """Rows that ``grouped`` really multiplies for these sizes, int32 scalar."""
        ...


@struct.dataclass
class Stats:
    """What a dispatch ran.

    Attributes:
      executed: int32, rows through an alternative, padding and masked work included.
      dropped: int32, slots of the plan that were not served.
    """

    executed: Int[Array, ""]
    dropped: Int[Array, ""]


def mask(
    plan: RoutePlan, x: Float[Array, "n d"], bank: Bank, num_experts: int
) -> tuple[Float[Array, "n o"], Stats]:
    """Runs every alternative on every row and weighs the results: the reference; saves nothing."""
    everywhere = jnp.broadcast_to(x, (num_experts, *x.shape))
    outputs = bank.batched(everywhere)
    weights = plan.one_hot(num_experts).astype(outputs.dtype)
    executed = jnp.int32(num_experts * x.shape[0])
    return jnp.einsum("eno,ne->no", outputs, weights), Stats(executed, jnp.int32(0))


def gather(
    plan: RoutePlan, x: Float[Array, "n d"], bank: Bank, num_experts: int
) -> tuple[Float[Array, "n o"], Stats]:
    """Gathers each slot's weights: for a few rows (decoding); all k slots run, kept or not."""
    del num_experts
    rows = jnp.broadcast_to(x[:, None, :], (*plan.experts.shape, x.shape[1]))
    outputs = bank.gathered(rows, plan.experts)
    return combine(outputs, plan), Stats(jnp.int32(plan.experts.size), jnp.int32(0))


def dropless(
    plan: RoutePlan, x: Float[Array, "n d"], bank: Bank, num_experts: int
) -> tuple[Float[Array, "n o"], Stats]:
    """Sorts the kept slots by alternative and runs exactly those (Gale et al. 2022, without their padding copies)."""
    order, place, sizes = sort_slots(plan, num_experts)
    order = order[: plan.bound]
    place = jnp.minimum(place, order.shape[0] - 1)
    rows = take(x, order // plan.experts.shape[1], place.reshape(plan.keep.shape), plan.keep)
    outputs = bank.grouped(rows, sizes)
    slots = take(outputs, place, order[:, None], plan.keep.reshape(-1)[order][:, None])
    slots = slots.reshape(*plan.experts.shape, -1)
    executed = bank.executed(sizes, rows.shape[0])
    return combine(slots, plan), Stats(executed, jnp.int32(0))


Priority = Literal["row", "choice", "score"]
"""Who is served first: rows in order; first choices before second ones, rows in order within; or choice by choice in
the order of ``plan.priority`` (batch-prioritised routing, Riquelme et al. 2021)."""


def capacity(
    plan: RoutePlan,
    x: Float[Array, "n d"],
    bank: Batched,
    num_experts: int,
    slots: int,
    priority: Priority = "row",
) -> tuple[Float[Array, "n o"], Stats]:
    """At most ``slots`` rows an alternative; the rest are dropped (Lepikhin et al. 2020).

    Indices come from a sort; nothing of size rows x alternatives x slots is ever built.
    """
    order, place, sizes = sort_slots(plan, num_experts, priority)
    starts = jnp.cumsum(sizes) - sizes
    rank = place - starts[plan.experts.reshape(-1)]
    served = plan.keep.reshape(-1) & (rank < slots)
    places = jnp.arange(slots, dtype=jnp.int32)[None, :]
    slot = order[jnp.minimum(starts[:, None] + places, order.shape[0] - 1)].reshape(-1)
    flat = plan.experts.reshape(-1) * slots + jnp.clip(rank, 0, slots - 1)
    back = flat.reshape(plan.keep.shape), served.reshape(plan.keep.shape)
    rows = take(x, slot // plan.experts.shape[1], *back)
    outputs = bank.batched(rows.reshape(num_experts, slots, -1))
    filled = (places < sizes[:, None]).reshape(-1, 1)
    chosen = take(outputs.reshape(-1, outputs.shape[-1]), flat, slot[:, None], filled)
    chosen = chosen.reshape(*plan.experts.shape, -1)
    dropped = jnp.sum(plan.keep, dtype=jnp.int32) - jnp.sum(served, dtype=jnp.int32)
    kept = plan.only(served.reshape(plan.keep.shape))
    return combine(chosen, kept), Stats(jnp.int32(num_experts * slots), dropped)


def limit(
    plan: RoutePlan, slots: Int[Array, "e"], priority: Priority = "row"
) -> tuple[RoutePlan, Int[Array, ""]]:
    """Keeps at most ``slots[i]`` rows of alternative i: what `capacity` drops, as a plan any dispatch can run.

    Returns:
      The plan and how many slots were dropped, int32.
    """
    order, place, sizes = sort_slots(plan, slots.shape[0], priority)
    del order
    starts = jnp.cumsum(sizes) - sizes
    rank = place.reshape(plan.experts.shape) - starts[plan.experts]
    kept = plan.only(rank < slots[plan.experts])
    dropped = jnp.sum(plan.keep, dtype=jnp.int32) - jnp.sum(kept.keep, dtype=jnp.int32)
    return kept, dropped


def sort_slots(
    plan: RoutePlan, num_experts: int, priority: Priority = "row"
) -> tuple[Int[Array, "m"], Int[Array, "m"], Int[Array, "e"]]:
    """Stable order of the n*k slots by alternative, unused slots last; within one alternative by ``priority``.

    Returns:
      order int32 [m]: slot at each sorted place; place int32 [m]: its inverse; sizes int32 [e].
    """
    key = jnp.where(plan.keep, plan.experts, num_experts).reshape(-1)
    if priority == "row":
        order = jnp.argsort(key, stable=True).astype(jnp.int32)
    else:
        first = _in_turn(plan, priority)
        order = first[jnp.argsort(key[first], stable=True)]
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    return order, place, plan.load(num_experts)


def _in_turn(plan: RoutePlan, priority: Priority) -> Int[Array, "m"]:
    """All slots, first choices before second ones; rows in order or by descending ``plan.priority``."""
    n, k = plan.experts.shape
    rows = jnp.arange(n, dtype=jnp.int32)
    if priority == "score":
        if plan.priority is None:
            raise DyncompError("priority='score' needs a router that sets RoutePlan.priority")
        rows = jnp.argsort(-plan.priority, stable=True).astype(jnp.int32)
    return (rows[None, :] * k + jnp.arange(k, dtype=jnp.int32)[:, None]).reshape(-1)


@jax.custom_vjp
def take(
    x: Float[Array, "n d"],
    index: Int[Array, "m"],
    back: Int[Array, "n r"],
    real: Bool[Array, "n r"],
) -> Float[Array, "m d"]:
    """``x[index]`` whose gradient is a gather too: row i of x went to rows ``back[i]`` of the result where ``real``.

    A gather's own gradient is a scatter-add: serial on CPUs, atomic additions in no fixed order on GPUs.
    """
    del back, real
    return x[index]


def _take_forward(x: Array, index: Array, back: Array, real: Array) -> tuple[Array, Any]:
    return x[index], (back, real)


def _take_backward(kept: Any, cotangent: Array) -> tuple[Array, None, None, None]:
    back, real = kept
    parts = jnp.where(real[..., None], cotangent[back], 0)
    return jnp.sum(parts, axis=1), None, None, None


take.defvjp(_take_forward, _take_backward)


def combine(slots: Float[Array, "n k o"], plan: RoutePlan) -> Float[Array, "n o"]:
    """Weighted sum over the kept slots; what an unused slot holds never matters (not even NaN)."""
    weights = jnp.where(plan.keep, plan.weights, 0.0).astype(slots.dtype)
    slots = jnp.where(plan.keep[..., None], slots, 0)
    return jnp.einsum("nko,nk->no", slots, weights)


def gather_rows(
    plan: KeepPlan, x: Float[Array, "n d"], fn: Callable[[Array], Array]
) -> Float[Array, "n d"]:
    """Runs ``fn`` on the kept rows only and adds the weighted result back (Raposo et al. 2024, eq. 1)."""
    rows = fn(x[plan.index])
    factor = jnp.where(plan.keep, plan.weights, 0.0).astype(x.dtype)
    return x.at[plan.index].add(rows * factor[:, None])


def cond(
    predicate: Bool[Array, ""], fn: Callable[[Any], Any], otherwise: Callable[[Any], Any], x: Any
) -> Any:
    """Runs ``fn`` or ``otherwise`` by one decision for the whole of ``x``.

    Raises:
      DyncompError: the predicate is not a scalar, or is batched by `jax.vmap`, where both branches would run.
    """
    if jnp.ndim(predicate) != 0:
        raise DyncompError(
            f"cond takes one decision, got shape {jnp.shape(predicate)}; use mask or gather_rows per example"
        )
    return lax.cond(_refuse_batching(predicate), fn, otherwise, x)


@jax.custom_batching.custom_vmap
def _refuse_batching(predicate: Array) -> Array:
    return predicate


@_refuse_batching.def_vmap
def _refuse(axis_size: int, in_batched: list[bool], predicate: Array) -> Any:
    del axis_size, in_batched, predicate
    raise DyncompError(
        "cond under vmap runs both branches; decide once for the batch or use mask or gather_rows"
    )
