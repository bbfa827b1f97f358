"""The definition: dense attention under the mask that the lists stand for. Quadratic; for tests."""

import jax.numpy as jnp
from jax import Array

from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of, table_of


def allowed_of(
    lists: BlockLists,
    b: int,
    t: int,
    s: int,
    heads: int,
    *,
    causal: bool,
    offset: int = 0,
    real: Array | None = None,
    window: int | None = None,
    sink: int = 0,
) -> Array:
    """Which keys each query of each head sees, bool [b h t s]."""
    table = table_of(lists, blocks_of(s, lists.columns))
    mask = jnp.repeat(jnp.repeat(table, lists.rows, axis=2), lists.columns, axis=3)[:, :, :t, :s]
    mask = jnp.repeat(mask, heads // mask.shape[1], axis=1)
    mask = jnp.broadcast_to(mask, (b, heads, t, s))
    if causal:
        mask = mask & (jnp.arange(s)[None] <= offset + jnp.arange(t)[:, None])
    if window is not None:
        key, place = jnp.arange(s)[None], offset + jnp.arange(t)[:, None]
        mask = mask & ((key > place - window) | (key < sink))
    return mask if real is None else mask & real[:, None, None, :]


def sparse_attention_reference(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    *,
    causal: bool = True,
    offset: int = 0,
    real: Array | None = None,
    window: int | None = None,
    sink: int = 0,
) -> tuple[Array, Array]:
    """``sparse_attention`` in the dtype of its arguments, by whole rows; zeros and -inf where a query sees nothing."""
    (b, t, h, p), s = q.shape, k.shape[1]
    repeat = lambda x: jnp.repeat(x, h // x.shape[2], axis=2)
    scores = jnp.einsum("bthp,bshp->bhts", q, repeat(k)) / jnp.sqrt(jnp.asarray(p, q.dtype))
    rule = {"causal": causal, "window": window, "sink": sink}
    seen = allowed_of(lists, b, t, s, h, offset=offset, real=real, **rule)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bhts,bshp->bthp", weights / jnp.where(total > 0, total, 1), repeat(v))
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top, -jnp.inf)
    return mixed, jnp.moveaxis(lse[..., 0], 1, 2)
