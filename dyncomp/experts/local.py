"""Where every unit of the ffn seam that dispatches rows opens its `local_op`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import AxisNames, local_op
from dyncomp.core.typing import Array, Float


def on_own_rows(
    fn: Callable[[RoutePlan, Array, Any], tuple[Array, ...]],
    plan: RoutePlan,
    rows: Float[Array, "n d"],
    bank: Any,
    bank_names: Sequence[AxisNames] | None = None,
    counts: int = 1,
) -> tuple[Array, ...]:
    """Runs ``fn(plan, rows, bank)`` on each device's own rows under a mesh; at once on one device.

    Args:
      fn: returns the output [n o] and ``counts`` integer arrays, which are added up over the devices.
      bank: a pytree of weights, cast to the dtype of the rows.
      bank_names: logical axes that each leaf stays split over; None gathers the weights whole.
    """
    leaves, treedef = jax.tree.flatten((plan, bank))

    def local(rows: Array, *leaves: Array) -> tuple[Array, ...]:
        plan, bank = jax.tree.unflatten(treedef, leaves)
        y, *found = fn(plan, rows, jax.tree.map(lambda w: w.astype(rows.dtype), bank))
        return y, *(count[None] for count in found)

    split = lambda leaf: ("rows", *(None,) * (leaf.ndim - 1))
    whole = [(None,) * leaf.ndim for leaf in jax.tree.leaves(bank)]
    names = [*map(split, jax.tree.leaves(plan)), *(whole if bank_names is None else bank_names)]
    out = (split(rows), *[("rows",)] * counts)
    y, *found = local_op(local, [split(rows), *names], out)(rows, *leaves)
    return y, *(jnp.sum(count, axis=0, dtype=jnp.int32) for count in found)
