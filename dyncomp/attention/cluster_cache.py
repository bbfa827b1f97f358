"""The state of `ClusterSelection`: tokens of each row side by side, boxes around clusters of them, the last lists."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.attention.asked import pick, put
from dyncomp.attention.boxes import Boxes, boxes_of, grown
from dyncomp.attention.cache import CacheState
from dyncomp.attention.look_once import most_looked_at
from dyncomp.core.typing import Array, Bool, Float, Int

HANDED = ("layer", "clusters", "read", "positions", "looked")


@struct.dataclass
class ClusterBudgets:
    """Run-time values: changing them compiles nothing.

    Attributes:
      kept: share of a prompt's tokens that stay after its first pass.
      coarse: share of the coarse clusters whose children are looked at, at most the policy's ``coarse_share``.
      share: share of all clusters that a query reads, at most the policy's.
      clusters: how many clusters a query reads at most, the first and the last among them.
      alpha: weight of the greatest coordinates in a centre (`tuned` makes the centres anew).
    """

    kept: Any  # unchecked: jax also builds trees of shapes
    coarse: Any
    share: Any
    clusters: Any
    alpha: Any


@struct.dataclass
class ClusterCache(CacheState):
    """Kept tokens; row by row, only real ones, in the order of the text.

    Attributes:
      keys: [b s g p], with their positions.
      values: [b s g p].
      positions: int32 [b s], places in the text; -1 where empty.
      looked: float32 [b s], how much the prompt's last queries looked at a token; inf for later tokens.
      count: int32 [b], slots in use.
      length: int32 [], places given out.
      fine, coarse: boxes of both levels; coarse is None for one level.
      clusters: int32 [b g m], what the last query read, ascending.
      read: bool [b g m], which entries of it count.
      layer: int32 [], how many selecting layers lie below.
      budgets: run-time values.
      policy: static.
    """

    keys: Float[Array, "*l b s g p"]
    values: Float[Array, "*l b s g p"]
    positions: Int[Array, "*l b s"]
    looked: Float[Array, "*l b s"]
    count: Int[Array, "*l b"]
    length: Int[Array, "*l"]
    fine: Boxes
    coarse: Boxes | None
    clusters: Int[Array, "*l b g m"]
    read: Bool[Array, "*l b g m"]
    layer: Int[Array, "*l"]
    budgets: ClusterBudgets
    policy: Any = struct.field(pytree_node=False)

    def seen(self) -> Int[Array, "b"]:
        """Tokens kept."""
        return self.count

    def handed(self) -> dict[str, Array]:
        """What the layer above may share: which tokens stayed, and which clusters were read."""
        if self.policy.share_group == 1:
            return {}
        up = {name: getattr(self, name) for name in HANDED} | {"layer": self.layer + 1}
        return {f"kept_{name}": value for name, value in up.items()}


def tuned(cache: ClusterCache, **values: Array | float | int) -> ClusterCache:
    """With other `ClusterBudgets` (``kept`` matters before the prompt only); a new ``alpha`` moves the centres.

    Works on scanned layers' stacked caches too.
    """
    old = cache.budgets
    new = {k: jnp.full_like(getattr(old, k), value) for k, value in values.items()}
    cache = dataclasses.replace(cache, budgets=dataclasses.replace(old, **new))
    return over_layers(boxed, cache) if "alpha" in values else cache


def evicted(cache: ClusterCache, kept: Array | float) -> ClusterCache:
    """With only the ``kept`` share of the prompt's tokens that its last queries looked at most; later ones all stay.

    Works on scanned layers' stacked caches too.
    """
    return over_layers(lambda cache: _evicted(cache, kept), cache)


def _evicted(cache: ClusterCache, kept: Array | float) -> ClusterCache:
    used = cache.positions >= 0
    later = used & jnp.isinf(cache.looked)
    stay = later | most_looked_at(cache.looked, used & ~later, kept)
    return compacted(cache, stay)


def compacted(cache: ClusterCache, stay: Bool[Array, "b s"]) -> ClusterCache:
    """Only the slots that ``stay``, moved together, with new boxes."""
    order = jnp.argsort(~stay, axis=1, stable=True).astype(jnp.int32)
    count = jnp.sum(stay, axis=1, dtype=jnp.int32)
    used = jnp.arange(order.shape[1], dtype=jnp.int32)[None] < count[:, None]
    moved = lambda x: jnp.where(used.reshape(*used.shape, *[1] * (x.ndim - 2)), pick(x, order), 0)
    return boxed(
        dataclasses.replace(
            cache,
            keys=moved(cache.keys),
            values=moved(cache.values),
            positions=jnp.where(used, pick(cache.positions, order), -1),
            looked=moved(cache.looked),
            count=count,
        )
    )


def boxed(cache: ClusterCache) -> ClusterCache:
    """With boxes made from the keys."""
    policy = cache.policy
    make = lambda size: boxes_of(cache.keys, cache.count, size, policy.weight(cache))
    coarse = None if policy.coarse is None else make(policy.coarse)
    return dataclasses.replace(cache, fine=make(policy.cluster), coarse=coarse)


def appended(
    cache: ClusterCache,
    key: Float[Array, "b g p"],
    value: Float[Array, "b g p"],
    place: Int[Array, "b"],
) -> ClusterCache:
    """With one more token a row, where ``place`` is not -1; past the last slot its key is NaN."""
    policy, slots = cache.policy, cache.keys.shape[1]
    real = place >= 0
    at = jnp.minimum(cache.count, slots - 1)
    full = real & (cache.count >= slots)
    key = jnp.where(full[:, None, None], jnp.asarray(jnp.nan, key.dtype), key)

    def written(x: Array, new: Array) -> Array:
        keep = real.reshape(-1, *[1] * (new.ndim - 1))
        return put(x, at, jnp.where(keep, new.astype(x.dtype), pick(x, at[:, None])[:, 0]))

    def grow(boxes: Boxes, size: int) -> Boxes:
        return grown(boxes, key, at, size, policy.weight(cache), real)

    coarse = None if cache.coarse is None else grow(cache.coarse, policy.coarse)
    return dataclasses.replace(
        cache,
        keys=written(cache.keys, key),
        values=written(cache.values, value),
        positions=written(cache.positions, place),
        looked=written(cache.looked, jnp.full_like(cache.looked[:, 0], jnp.inf)),
        count=jnp.minimum(cache.count + real, slots),
        length=cache.length + 1,
        fine=grow(cache.fine, policy.cluster),
        coarse=coarse,
    )


def over_layers(fn: Any, cache: ClusterCache) -> ClusterCache:
    """``fn`` on one layer's cache, or on each of a stack."""
    return jax.vmap(fn)(cache) if cache.length.ndim else fn(cache)
