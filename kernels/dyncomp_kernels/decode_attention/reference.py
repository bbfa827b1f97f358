"""The definition, with nothing gathered: dense attention in which only the listed slots are seen."""

import jax.numpy as jnp
from jax import Array

from dyncomp_kernels.decode_attention.packing import Packed


def decode_attention_reference(
    q: Array, k: Array, v: Array, index: Array, seen: Array
) -> tuple[Array, Array]:
    """`api.decode_attention` by whole rows, in the dtype of its arguments."""
    (b, h, p), (s, g) = q.shape, k.shape[1:3]
    heads = index.shape[1]
    listed = jnp.zeros((b, heads, s), bool)
    rows, own = jnp.arange(b)[:, None, None], jnp.arange(heads)[None, :, None]
    listed = listed.at[rows, own, jnp.where(seen, index, s)].set(True, mode="drop")
    listed = jnp.repeat(listed, h // heads, axis=1)
    repeat = lambda x: jnp.repeat(x, h // g, axis=2)
    scores = jnp.einsum("bhp,bshp->bhs", q, repeat(k)) / jnp.sqrt(jnp.asarray(p, q.dtype))
    scores = jnp.where(listed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(listed, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bhs,bshp->bhp", weights / jnp.where(total > 0, total, 1), repeat(v))
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top, -jnp.inf)
    return mixed, lse[..., 0]


def packed_attention_reference(
    q: Array, keys: Packed, values: Packed, seen: Array
) -> tuple[Array, Array]:
    """`packed.packed_attention` over everything dequantised."""
    (h, p), g = q.shape[2:], keys.codes.shape[1]
    repeat = lambda x: jnp.repeat(x.whole(), h // g, axis=1)
    there = (seen[:, None] if seen.ndim == 2 else seen)[:, None]
    scores = jnp.einsum("bthp,bhmp->bhtm", q, repeat(keys)) / jnp.sqrt(jnp.asarray(p, q.dtype))
    scores = jnp.where(there, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(there, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    mixed = jnp.einsum("bhtm,bhmp->bthp", weights / some, repeat(values))
    lse = jnp.where(total > 0, jnp.log(some) + top, -jnp.inf)
    return mixed, jnp.swapaxes(lse[..., 0], 1, 2)
