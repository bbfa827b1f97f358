"""The only place that knows names which move between jax releases."""

from typing import Any

import jax
from jax import lax


def varying_axes(x: Any) -> frozenset[str]:
    """Mesh axes that ``x`` varies over inside a `shard_map`; the attribute was ``vma`` before jax 0.10."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", ()))


def vary_like(x: jax.Array, *others: Any) -> jax.Array:
    """Marks ``x`` as varying over the mesh axes that any of ``others`` varies over; identity outside `shard_map`.

    A loop carry must vary over the same axes before and after an iteration.
    """
    axes = frozenset().union(*(varying_axes(other) for other in others))
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def out_like(shape: tuple[int, ...], dtype: Any, *others: Any) -> jax.ShapeDtypeStruct:
    """A kernel's output that varies over the mesh axes that any of ``others`` varies over.

    `shard_map` refuses a `pallas_call` whose output does not say so; the argument was ``vma`` before jax 0.10.
    """
    axes = frozenset().union(*(varying_axes(other) for other in others))
    kind = getattr(jax.sharding, "ManualAxisType", None)
    words = {"manual_axis_type": kind(varying=axes)} if kind else {"vma": axes}
    return jax.ShapeDtypeStruct(shape, dtype, **words)
