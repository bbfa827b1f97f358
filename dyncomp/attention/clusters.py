"""Attention inside clusters of tokens, without a table of all pairs: two memberships as pure functions.

*Nearest*: every token is in its one nearest cluster and reads the last w members up to itself. That is a window over
tokens sorted by cluster, so it costs what local attention costs and is strictly causal. *Best*: every cluster takes its
w best tokens of the whole sequence (Roy et al. 2021); whether a token is taken depends on later ones.

Queries and keys are the same vectors ``x``; logits are plain products. Letters beside the legend's: ``c`` clusters,
``w`` members read, ``x`` chunks or clusters, ``m`` keys of a chunk (w or 2 w).
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels.sparse_attention.running import LOWEST

Table = Float[Array, "h r p"]
"""Embeddings of how many members lie between two; the last one serves all larger distances."""


@struct.dataclass
class ClusterPlan:
    """Which clusters tokens belong to.

    Attributes:
      nearest: int32 [b h t], the best cluster of each token.
      joined: int32 [b h t], in how many clusters the token takes part; 0 for padding and what no cluster took.
    """

    nearest: Int[Array, "*l b h t"]
    joined: Int[Array, "*l b h t"]


def attend_nearest(
    x: Float[Array, "b h t p"],
    v: Float[Array, "b h t p"],
    nearest: Int[Array, "b h t"],
    real: Bool[Array, "b t"] | None,
    w: int,
    tables: tuple[Table, Table] | None = None,
) -> tuple[Float[Array, "b h t p"], Int[Array, "b"], int]:
    """Every token reads the last ``w`` tokens of its own cluster up to itself.

    Returns:
      mixed values (zeros for padding), needed pairs of each sequence over all heads, and executed ones.
    """
    b, h, t, _ = x.shape
    w = min(w, t)
    nothing = jnp.iinfo(jnp.int32).max
    own = nearest if real is None else jnp.where(real[:, None], nearest, nothing)
    order = jnp.argsort(own, axis=-1, stable=True)
    chunks = -(-t // w)
    fill = ((0, 0), (0, 0), (0, chunks * w - t))
    group = jnp.pad(
        jnp.take_along_axis(own, order, axis=-1), fill, constant_values=nothing
    ).reshape(b, h, chunks, w)
    cut = lambda y: jnp.pad(
        jnp.take_along_axis(y, order[..., None], axis=2), (*fill, (0, 0))
    ).reshape(b, h, chunks, w, y.shape[-1])
    own_x, own_v = cut(x), cut(v)
    keys, values, groups = (_with_previous(y) for y in (own_x, own_v, group))
    distance = _distance(w, keys.shape[3])
    seen = (distance >= 0) & (distance < w)
    seen = seen & (group[..., None] == groups[..., None, :]) & (group != nothing)[..., None]
    if chunks > 1:  # what stands before the first chunk is no token
        seen = seen.at[:, :, 0, :, :w].set(False)
    mixed = _attend(own_x, keys, values, seen, tables)
    mixed = mixed.reshape(b, h, chunks * w, -1)[:, :, :t]
    back = jnp.argsort(order, axis=-1)
    needed = jnp.sum(seen, axis=(1, 2, 3, 4), dtype=jnp.int32)
    return jnp.take_along_axis(mixed, back[..., None], axis=2), needed, h * seen[0, 0].size


def _with_previous(y: Array) -> Array:
    """Chunks [b h x w ...] behind the chunk before each: [b h x 2w ...]; a single chunk stays alone."""
    if y.shape[2] == 1:
        return y
    return jnp.concatenate([jnp.roll(y, 1, axis=2), y], axis=3)


def best_members(
    scores: Float[Array, "b h t c"], real: Bool[Array, "b t"] | None, w: int
) -> tuple[Int[Array, "b h c w"], Bool[Array, "b h c w"]]:
    """The ``w`` best tokens of every cluster in ascending order, and which slots hold one (padding takes none)."""
    t = scores.shape[2]
    scores = jnp.swapaxes(scores, 2, 3)
    if real is not None:
        scores = jnp.where(real[:, None, None], scores, -jnp.inf)
    best, index = lax.top_k(scores, min(w, t))
    index = jnp.sort(jnp.where(best > -jnp.inf, index.astype(jnp.int32), t), axis=-1)
    return jnp.minimum(index, t - 1), index < t


def attend_best(
    x: Float[Array, "b h t p"],
    v: Float[Array, "b h t p"],
    members: Int[Array, "b h c w"],
    kept: Bool[Array, "b h c w"],
    *,
    causal: bool = True,
    eps: float = 0.01,
    tables: tuple[Table, Table] | None = None,
) -> tuple[Float[Array, "b h t p"], Int[Array, "b h t"], Int[Array, "b"], int]:
    """Attention among the members of each cluster; a token gets the sum over its clusters / (their number + eps).

    Returns:
      mixed values (zeros for tokens in no cluster), the number of clusters of each token, needed pairs of each
      sequence over all heads, and executed ones.
    """
    b, h, t, p = x.shape
    c, w = members.shape[2:]
    flat = members.reshape(b, h, c * w)
    taken = lambda y: jnp.take_along_axis(y, flat[..., None], axis=2).reshape(b, h, c, w, -1)
    own = taken(x)
    seen = kept[..., None] & kept[..., None, :]
    if causal:
        seen = seen & (_distance(w, w) >= 0)
    mixed = _attend(own, own, taken(v), seen, tables)
    row = (jnp.arange(b)[:, None, None], jnp.arange(h)[None, :, None], flat)
    kept = kept.reshape(b, h, c * w)
    total = (
        jnp.zeros((b, h, t, p), jnp.float32)
        .at[row]
        .add(mixed.reshape(b, h, c * w, p).astype(jnp.float32))
    )
    joined = jnp.zeros((b, h, t), jnp.int32).at[row].add(kept.astype(jnp.int32))
    out = total / (joined.astype(jnp.float32) + jnp.float32(eps))[..., None]
    needed = jnp.sum(seen, axis=(1, 2, 3, 4), dtype=jnp.int32)
    return out.astype(v.dtype), joined, needed, h * c * w * w


def newest_members(
    x: Float[Array, "b h 1 p"],
    keys: Float[Array, "b h s p"],
    values: Float[Array, "b h s p"],
    member: Int[Array, "b h s"],
    w: int,
    tables: tuple[Table, Table] | None = None,
) -> tuple[Float[Array, "b h 1 p"], Int[Array, "b"], int]:
    """One query over the last ``w`` slots of its cluster: `attend_nearest` for a cache.

    Args:
      member: place of the slot in its sequence where it belongs to the query's cluster and is not behind it, else -1.
    """
    w = min(w, member.shape[-1])
    place, index = lax.top_k(member, w)  # newest first: the entry is the distance
    taken = lambda y: jnp.take_along_axis(y, index[..., None], axis=2)[:, :, None]
    seen = (place >= 0)[:, :, None, None]
    mixed = _attend(x[:, :, None], taken(keys), taken(values), seen, tables, newest_first=True)
    return mixed[:, :, 0], jnp.sum(seen, axis=(1, 2, 3, 4), dtype=jnp.int32), x.shape[1] * w


def _distance(w: int, m: int) -> Int[Array, "w m"]:
    """How many members before query i key j stands, when the last w of m keys are the queries themselves."""
    i, j = jnp.arange(w, dtype=jnp.int32), jnp.arange(m, dtype=jnp.int32)
    return i[:, None] + (m - w) - j[None]


def _attend(q, keys, values, seen, tables, *, newest_first: bool = False):
    """softmax(q k + q r) (v + r) over keys that are seen; zeros for a query that sees none.

    Args:
      q, keys, values: [b h x w p], [b h x m p] twice; the last w keys are the queries themselves.
      seen: bool, broadcasts to [b h x w m].
      tables: of keys and of values.
      newest_first: one query, and key j is the one at distance j.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits, m = product("bhxwp,bhxmp->bhxwm", q, keys), keys.shape[3]
    if tables is not None:
        far = m if newest_first else q.shape[3]
        near = product("bhxwp,hrp->bhxwr", q, _up_to(tables[0].astype(q.dtype), far))
        logits = logits + (near if newest_first else _by_key(near, m))
    weights = jax.nn.softmax(jnp.where(seen, logits, LOWEST), axis=-1)
    weights = jnp.where(seen, weights, 0.0).astype(values.dtype)
    mixed = product("bhxwm,bhxmp->bhxwp", weights, values)
    if tables is not None:
        each = weights if newest_first else _by_distance(weights)
        table = _up_to(tables[1].astype(values.dtype), each.shape[-1])
        mixed = mixed + product("bhxwr,hrp->bhxwp", each, table)
    return mixed.astype(values.dtype)


def _up_to(table: Table, w: int) -> Array:
    """Rows for the distances 0 .. w - 1."""
    return table[:, jnp.minimum(jnp.arange(w), table.shape[1] - 1)]


def _by_key(near: Float[Array, "b h x w w"], m: int) -> Float[Array, "b h x w m"]:
    """Numbers of a query and a distance, moved to the key at that distance: a shift of each row, no gather."""
    w = near.shape[-1]
    wide = jnp.pad(near[..., ::-1], (*[(0, 0)] * 4, (1, w)))  # rows of 2 w + 1: each a step behind
    lead = near.shape[:3]
    return wide.reshape(*lead, -1)[..., : 2 * w * w].reshape(*lead, w, 2 * w)[..., 2 * w - m :]


def _by_distance(weights: Float[Array, "b h x w m"]) -> Float[Array, "b h x w w"]:
    """The inverse of `_by_key` on keys at distances 0 .. w - 1."""
    w, m = weights.shape[-2:]
    lead = weights.shape[:3]
    flat = jnp.pad(weights, (*[(0, 0)] * 4, (2 * w - m, 0))).reshape(*lead, -1)
    wide = jnp.pad(flat, (*[(0, 0)] * 3, (0, w))).reshape(*lead, w, 2 * w + 1)
    return wide[..., 1 : w + 1][..., ::-1]
