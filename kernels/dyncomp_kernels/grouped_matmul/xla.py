"""Portable form: a loop over blocks of rows, each of one group, that runs only the blocks in use.

::

    rows   |aaaaaaaa|aa bbbbb|bbb ccc.|........|     group sizes 10, 8, 3; block 8
    blocks  a0------ a1------                         block a1 also computes six rows of b with a's weights;
                        b0------                      b0, which runs later, overwrites them.
                                c0------              Rows past the last group are cleared at the end.
"""

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._compat import vary_like

MAX_BLOCK = 128
MIN_BLOCK = 16


def block_rows(rows: int, groups: int) -> int:
    """Static block size: about half an even group, a power of two between 16 and 128."""
    even = max(rows // (2 * groups), 1)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << (even.bit_length() - 1)))


def block_table(group_sizes: Array, block: int, capacity: int) -> tuple[Array, Array, Array]:
    """Which group each block belongs to, its first row, and how many blocks are in use.

    Args:
      group_sizes: int32 [e].
      block: rows a block.
      capacity: static bound on the number of blocks.

    Returns:
      group int32 [capacity], start int32 [capacity], used int32 scalar.
    """
    blocks = -(-group_sizes // block)
    ends = jnp.cumsum(blocks)
    starts = jnp.cumsum(group_sizes) - group_sizes
    index = jnp.arange(capacity, dtype=jnp.int32)
    group = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    group = jnp.minimum(group, group_sizes.shape[0] - 1)
    start = starts[group] + (index - (ends - blocks)[group]) * block
    return group, start.astype(jnp.int32), ends[-1].astype(jnp.int32)


def executed_rows(group_sizes: Array, rows: int) -> Array:
    """Rows that the loop multiplies, padding of partial blocks included; int32 scalar."""
    block = block_rows(rows, group_sizes.shape[0])
    return jnp.sum(-(-group_sizes // block) * block).astype(jnp.int32)


def _setup(rows: Array, group_sizes: Array) -> tuple[int, tuple[Array, Array, Array]]:
    m, e = rows.shape[0], group_sizes.shape[0]
    block = block_rows(m, e)
    return block, block_table(group_sizes, block, -(-m // block) + e)


def forward(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """rows [m k] x weights [e k n] by group -> [m n]."""
    m = rows.shape[0]
    block, (group, start, used) = _setup(rows, group_sizes)
    padded = jnp.pad(rows, ((0, block), (0, 0)))

    def body(i: Array, out: Array) -> Array:
        tile = lax.dynamic_slice_in_dim(padded, start[i], block)
        weight = lax.dynamic_index_in_dim(weights, group[i], keepdims=False)
        product = jnp.dot(tile, weight, preferred_element_type=jnp.float32).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, product, start[i], axis=0)

    out = jnp.zeros((m + block, weights.shape[2]), rows.dtype)
    out = lax.fori_loop(0, used, body, vary_like(out, rows, weights, group_sizes))[:m]
    return jnp.where((jnp.arange(m) < jnp.sum(group_sizes))[:, None], out, 0)


def weight_gradient(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sum over each group's rows of rows^T cotangent: [m k], [m n] -> [e k n]."""
    block, (group, start, used) = _setup(rows, group_sizes)
    ends = jnp.cumsum(group_sizes)
    rows = jnp.pad(rows, ((0, block), (0, 0)))
    cotangent = jnp.pad(cotangent, ((0, block), (0, 0)))

    def body(i: Array, total: Array) -> Array:
        own = (start[i] + jnp.arange(block) < ends[group[i]])[:, None]
        left = lax.dynamic_slice_in_dim(rows, start[i], block)
        right = jnp.where(own, lax.dynamic_slice_in_dim(cotangent, start[i], block), 0)
        part = jnp.dot(left.T, right, preferred_element_type=jnp.float32)
        return total.at[group[i]].add(part)

    shape = (group_sizes.shape[0], rows.shape[1], cotangent.shape[1])
    total = vary_like(jnp.zeros(shape, jnp.float32), rows, cotangent, group_sizes)
    return lax.fori_loop(0, used, body, total)
