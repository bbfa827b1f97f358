"""The public operation: one query a head over the slots that a list names; bytes read follow the list."""

import math

import jax
import jax.numpy as jnp
from jax import Array


def decode_attention(
    q: Array, k: Array, v: Array, index: Array, seen: Array
) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(p)) v over listed slots of a cache.

    Head j reads key/value head ``j // (h / g)``. Softmax and sums are float32. Only listed slots are read, whatever
    the cache holds; lists are run-time values.

    Args:
      q: [b h p], float32 or bfloat16.
      k, v: [b s g p], g a divisor of h.
      index: int32 [b a m], slots in range, a = 1 for one list for all heads or a = g. Those that count are distinct.
      seen: bool [b a m], which entries count.

    Returns:
      [b h p] in the dtype of q, and the log-sum-exp of the scores, float32 [b h]; zeros and -inf where nothing counts.

    Raises:
      ValueError: shapes do not fit.
    """
    (b, h, p), g, (_, a, _) = q.shape, k.shape[2], index.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (b, p) or h % g or a not in (1, g):
        raise ValueError(
            f"decode_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, index {list(index.shape)};"
            " give [b h p], two of [b s g p] with g a divisor of h, and [b 1 m] or [b g m]"
        )
    keys, values = (gathered(x, index) for x in (k, v))
    return attend_gathered(q, keys, values, seen)


def gathered(x: Array, index: Array) -> Array:
    """Listed slots of [b s g p] as [b m g p]; ``index`` [b 1 m] or [b g m]."""
    if index.shape[1] == 1:
        return jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="clip"))(x, index[:, 0])
    at = jnp.swapaxes(index, 1, 2)[..., None]
    return jnp.take_along_axis(x, at, axis=1, mode="clip")


def attend_gathered(q: Array, keys: Array, values: Array, seen: Array) -> tuple[Array, Array]:
    """`decode_attention` of slots that lie together: keys, values [b m g p], ``seen`` [b 1 m] or [b g m]."""
    (b, h, p), g = q.shape, keys.shape[2]
    scaled = (q.astype(jnp.float32) / math.sqrt(p)).astype(keys.dtype).reshape(b, g, h // g, p)
    scores = jnp.einsum("bgrp,bmgp->bgrm", scaled, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1)
    some = jnp.where(total > 0, total, 1.0)
    mixed = jnp.einsum(
        "bgrm,bmgp->bgrp", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    lse = jnp.where(total > 0, jnp.log(some) + top[..., 0], -jnp.inf)
    return (mixed / some[..., None]).reshape(b, h, p).astype(q.dtype), lse.reshape(b, h)
