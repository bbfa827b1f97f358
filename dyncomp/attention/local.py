"""Where attention over chosen pairs opens its `local_op`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.attention.compact import compacted
from dyncomp.attention.sight import Sight
from dyncomp.core.aux import Count
from dyncomp.core.sharding import local_op
from dyncomp.core.typing import Array, Float


def on_own_heads(
    pattern: Any,
    q: Float[Array, "b t h p"],
    k: Array,
    v: Array,
    sight: Sight,
    told: Any,
    padded: bool = True,
) -> tuple[Float[Array, "b t h p"], Count]:
    """A pattern on each device's own sequences under a mesh, and own heads where heads choose apart; at once on one.

    Heads stay together where the pattern says so (``heads_together``) or is told something about each of them.

    Args:
      told: what the pattern finds in ``controls``; None for nothing.
      padded: some slots between others may hold nothing; the pattern gets sequences without them (`compacted`).

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
        attend = lambda *args: pattern(*args, *(() if told is None else (told,)))
        mixed, pairs = compacted(attend, q, k, v, own) if padded else attend(q, k, v, own)
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


def heads_apart(fn: Callable[..., Any], *arrays: Array, tables: Any = None) -> tuple[Array, ...]:
    """``fn(*arrays, tables=tables)`` on each device's own sequences and heads under a mesh; at once on one device.

    Args:
      fn: returns arrays [b h ...], then needed pairs int32 [b] over the heads it saw, and executed ones, an int.
      arrays: [b h ...], or [b t] of booleans.
      tables: pair of [h r p], or None.

    Returns:
      What ``fn`` returns for all heads.
    """
    wide = lambda x: ("batch", None) if x.ndim == 2 else ("batch", "heads", *(None,) * (x.ndim - 2))
    leaves, treedef = jax.tree.flatten(tables)
    heads, shapes = (
        arrays[0].shape[1],
        jax.eval_shape(lambda *x: fn(*x, tables=tables)[:-2], *arrays),
    )

    def local(*args: Array) -> tuple[Array, ...]:
        own, tables = args[: len(arrays)], jax.tree.unflatten(treedef, args[len(arrays) :])
        *found, needed, executed = fn(*own, tables=tables)
        each = jnp.full((own[0].shape[0], 1), executed // own[0].shape[1], jnp.int32)
        return *found, needed[:, None], each

    names = [*map(wide, arrays), *(("heads", None, None) for _ in leaves)]
    out = (*map(wide, shapes), ("batch", "heads"), ("batch", "heads"))
    *found, needed, each = local_op(local, names, out)(*arrays, *leaves)
    return *found, jnp.sum(needed, axis=1, dtype=jnp.int32), heads * each[0, 0]
