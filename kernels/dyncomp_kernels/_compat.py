"""The only place that knows names which move between jax releases."""

from typing import Any

import jax
from jax import lax


def vary_like(x: jax.Array, *others: Any) -> jax.Array:
    """Marks ``x`` as varying over the mesh axes that any of ``others`` varies over; identity outside `shard_map`.

    A loop carry must vary over the same axes before and after an iteration.
    """
    axes: set[str] = set()
    for other in others:
        axes |= set(getattr(jax.typeof(other), "vma", ()))
    missing = tuple(sorted(axes - set(getattr(jax.typeof(x), "vma", ()))))
    return lax.pcast(x, missing, to="varying") if missing else x
