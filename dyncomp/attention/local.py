"""Where patterns open their `local_op`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.attention.sight import Sight
from dyncomp.core.aux import Count
from dyncomp.core.sharding import local_op
from dyncomp.core.typing import Array, Float


def on_own_heads(
    pattern: Any, q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight, told: Any
) -> tuple[Float[Array, "b t h p"], Count]:
    """A pattern on each device's own sequences under a mesh, and own heads where heads choose apart; at once on one.

    Heads stay together where the pattern says so (``heads_together``) or is told something about each of them.

    Args:
      told: what the pattern finds in ``controls``; None for nothing.

    Returns:
      Mixed values and the mean pairs of a sequence's head, float32.
    """
    together = told is not None or getattr(pattern, "heads_together", False)
    sight = dataclasses.replace(
        sight, key_place=jnp.broadcast_to(sight.key_place, (k.shape[0], k.shape[1]))
    )
    leaves, treedef = jax.tree.flatten((sight.place, told))

    def local(q: Array, k: Array, v: Array, key_place: Array, *leaves: Array) -> Any:
        place, told = jax.tree.unflatten(treedef, leaves)
        own = dataclasses.replace(sight, place=place, key_place=key_place)
        mixed, pairs = pattern(q, k, v, own, *(() if told is None else (told,)))
        pairs = pairs if isinstance(pairs, Count) else Count(pairs, pairs)
        wide = lambda x: jnp.asarray(x, jnp.float32).reshape(1, 1)
        return mixed, wide(pairs.needed), wide(pairs.executed)

    heads = None if together else "heads"
    rows = [("batch", None, None if together else name, None) for name in ("heads", "kv_heads")]
    names = [rows[0], rows[1], rows[1], ("batch", None), *((None,) * x.ndim for x in leaves)]
    counts = ("batch", heads)
    run = local_op(local, names, (rows[0], counts, counts))
    mixed, needed, executed = run(q, k, v, sight.key_place, *leaves)
    return mixed, Count(jnp.mean(needed), jnp.mean(executed))
