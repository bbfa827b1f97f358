"""Attention of a few new positions over keys and values of few bits, block by block; nothing is dequantised whole."""

import functools
import math

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels.decode_attention.packing import Packed
from dyncomp_kernels.sparse_attention.running import LOWEST, Running

BLOCK = 256
"""Slots that are unpacked at once."""


def packed_attention(
    q: Array,
    keys: Packed,
    values: Packed,
    seen: Array,
    begin: Array | int = 0,
    end: Array | int | None = None,
) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(p)) v over packed slots.

    Steps and lows of channels go into the queries and the output, those of slots into the weights, so products read
    codes as they are. Head j reads key/value head ``j // (h / g)``. Softmax and sums are float32.

    Args:
      q: [b t h p], float32 or bfloat16.
      keys: m slots, ``low`` and ``step`` [b g 1 p] (or 1s for any letter).
      values: the same slots, ``low`` and ``step`` [b 1 m 1] (or 1s), ``scale`` [b g 1 p].
      seen: bool [b m], or [b t m] where queries differ.
      begin, end: only slots in between are read, in whole blocks (run-time values); all others must be unseen.

    Returns:
      [b t h p] in the dtype of q, and the log-sum-exp of the scores, float32 [b t h]; zeros and -inf where nothing is
      seen.

    Raises:
      ValueError: shapes do not fit.
    """
    (b, t, h, p), (g, m) = q.shape, keys.codes.shape[1:3]
    if h % g or values.slots != m or seen.shape not in ((b, m), (b, t, m)):
        raise ValueError(
            f"packed_attention: q {list(q.shape)}, {m} and {values.slots} slots of {g} heads, seen {list(seen.shape)};"
            " give equally many slots, g a divisor of h, and [b m] or [b t m]"
        )
    seen = seen[:, None] if seen.ndim == 2 else seen
    split = q.astype(jnp.float32).reshape(b, t, g, h // g, p).transpose(0, 2, 3, 1, 4)
    split = split.reshape(b, g, -1, p) / math.sqrt(p)  # [b g n p], n = heads of a group x queries
    folded = split * (keys.step * keys.scale)
    offset = jnp.sum(split * (keys.low * keys.scale), axis=-1, keepdims=True)
    block = min(BLOCK, m)
    first, past = blocks_between(begin, m if end is None else end, m)
    run = functools.partial(_fold, folded, offset, keys, values, seen, block)
    _, total, mixed = state = lax.fori_loop(first, past, run, Running.blank(split.shape))
    some = jnp.where(total > 0, total, 1.0)
    mixed = mixed / some[..., None] * values.scale
    lse = jnp.where(total > 0, jnp.log(some) + state.top, -jnp.inf)
    back = lambda x: jnp.moveaxis(x.reshape(b, h, t, *x.shape[3:]), 2, 1)
    return back(mixed).astype(q.dtype), back(lse)


def blocks_between(begin: Array | int, end: Array | int, slots: int) -> tuple[Array, Array]:
    """First block that holds a slot from ``begin`` on, and the one past the last below ``end``."""
    block = min(BLOCK, slots)
    begin, end = jnp.asarray(begin, jnp.int32), jnp.asarray(end, jnp.int32)
    return begin // block, jnp.minimum(-(-end // block), -(-slots // block))


def _fold(q, offset, keys, values, seen, block, index, state):
    """One block more."""
    (b, g, n, _), m = q.shape, keys.slots
    begin = index * block
    start = jnp.minimum(begin, m - block)  # a last block that is not full starts earlier
    own = functools.partial(_slots, start=start, block=block)
    fresh = start + jnp.arange(block, dtype=jnp.int32) >= begin
    there = lax.dynamic_slice_in_dim(seen, start, block, axis=2) & fresh[None, None]
    there = jnp.broadcast_to(there[:, None, None], (b, g, n // there.shape[1], *there.shape[1:]))
    there = there.reshape(b, g, n, block)
    low, step = (own(x)[:, :, :, 0] for x in (values.low, values.step))  # [b 1 c] or [1 1 1]
    number = lambda x: x.numbers(own(x.codes)).astype(jnp.float32)
    scores = jnp.einsum("bgnp,bgcp->bgnc", q, number(keys)) + offset
    scores = jnp.where(there, scores, LOWEST)
    wide = number(values)

    def mix(weights: Array) -> Array:
        lows = jnp.sum(weights * low[:, :, None], axis=-1, keepdims=True)
        return jnp.einsum("bgnc,bgcp->bgnp", weights * step[:, :, None], wide) + lows

    return state.add(scores, mix, there)


def _slots(x: Array, start: Array, block: int) -> Array:
    """Slots of the third axis; a broadcast axis stays."""
    return x if x.shape[2] == 1 else lax.dynamic_slice_in_dim(x, start, block, axis=2)
