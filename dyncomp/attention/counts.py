"""How many slots of a cache are real up to each one, and where the real one of a number lies: for rows with gaps.

In two levels of blocks: XLA's CPU takes a running sum in many passes and a binary search in a loop, and every layer
asks for both in every step of decoding.
"""

import jax.numpy as jnp

from dyncomp.core.typing import Array, Bool, Float, Int

BLOCK = 128
"""Whole numbers up to it are exact in bfloat16, to which accelerators may round the factors of a product."""
NEVER = jnp.iinfo(jnp.int32).max


def counts_of(real: Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """Real slots up to and with each one; exact for s below 2^24."""
    b, s = real.shape
    blocks = -(-s // BLOCK)
    own = jnp.pad(real, ((0, 0), (0, blocks * BLOCK - s))).astype(jnp.float32)
    inside = _running(own.reshape(b, blocks, BLOCK))
    whole = inside[..., -1]
    counts = inside + (_running(whole) - whole)[..., None]
    return counts.reshape(b, -1)[:, :s].astype(jnp.int32)


def _running(x: Float[Array, "*n k"]) -> Float[Array, "*n k"]:
    k = x.shape[-1]
    return jnp.matmul(x, jnp.triu(jnp.ones((k, k), jnp.float32)))


def slots_of(counts: Int[Array, "b s"], rank: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The slot of each row's real token number ``rank``, from 0; s or more where there are fewer.

    Args:
      counts: of `counts_of`.
      rank: below 0, slot 0 comes out.
    """
    b, s = counts.shape
    blocks = -(-s // BLOCK)
    fill = ((0, 0), (0, blocks * BLOCK - s))
    rows = jnp.pad(counts, fill, constant_values=NEVER).reshape(b, blocks, BLOCK)
    short = lambda held: jnp.sum(held <= rank[..., None], axis=-1, dtype=jnp.int32)
    block = short(jnp.broadcast_to(rows[:, None, :, -1], (b, rank.shape[1], blocks)))
    own = jnp.take_along_axis(rows, jnp.minimum(block, blocks - 1)[..., None], axis=1)
    return block * BLOCK + jnp.where(block < blocks, short(own), 0)
