"""Portable form: loops over blocks of rows, each of one group, that run only the blocks in use.

::

    for each block size:                                 static; see blocks.py
      for each block of this size in use:                dynamic number of trips
        out[start:end] = rows[start:start+block] @ weights[group]

A block's weights are copied out of the stack (XLA on CPUs multiplies no slices), so few large blocks are cheap and many
small ones are not. The result is updated in place: each loop carries nothing but it, because what passes through a
`lax.switch` over block sizes inside one loop is copied whole in every trip.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels._widths import sum_dtype
from dyncomp_kernels.grouped_matmul.blocks import Sweep, executed_rows, sweeps, trips

__all__ = ["executed_rows", "forward", "row_gradient", "trips", "weight_gradient"]


def forward(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """rows [m k] x weights [e k n] by group -> [m n]; rows past the last group give zeros."""
    return _product(rows, weights, group_sizes, contract=1)


def row_gradient(cotangent: Array, weights: Array, group_sizes: Array) -> Array:
    """cotangent [m n] x weights [e k n] transposed, by group -> [m k]."""
    return _product(cotangent, weights, group_sizes, contract=2)


def _product(rows: Array, weights: Array, group_sizes: Array, contract: int) -> Array:
    shape = rows.shape[0], weights.shape[3 - contract]
    if 0 in rows.shape or 0 in weights.shape:
        return jnp.zeros(shape, rows.dtype)
    out = vary_like(zeros(shape, weights, group_sizes), rows, weights, group_sizes)
    for sweep in sweeps(group_sizes, rows.shape[0]):
        body = functools.partial(_multiply, sweep, rows, weights, contract - 1)
        out = lax.fori_loop(sweep.begin, sweep.stop, body, out)
    return out


def _multiply(sweep: Sweep, rows: Array, weights: Array, axis: int, i: Array, out: Array) -> Array:
    """Block ``i`` of the sweep: its product with its group's matrix, contracted over the matrix's ``axis``."""
    start, own = place(sweep, i, rows.shape[0])
    tile = lax.dynamic_slice_in_dim(rows, start, sweep.block)
    weight = lax.dynamic_index_in_dim(weights, sweep.group[i], keepdims=False)
    contract = (((1,), (axis,)), ((), ()))
    product = lax.dot_general(tile, weight, contract, preferred_element_type=sum_dtype(rows.dtype))
    product = product.astype(out.dtype)
    if not sweep.whole:
        product = jnp.where(own, product, lax.dynamic_slice_in_dim(out, start, sweep.block))
    return lax.dynamic_update_slice_in_dim(out, product, start, axis=0)


def zeros(shape: tuple[int, ...], x: Array, group_sizes: Array) -> Array:
    """Zeros in the type of ``x`` that XLA cannot share with another product's.

    Equal constants become one buffer, of which every product then takes a copy to write in place. So the zero comes
    from the data: no size is negative.
    """
    first = x[(0,) * x.ndim]
    return jnp.broadcast_to(jnp.where(group_sizes[0] < 0, first, 0), shape)


def place(sweep: Sweep, i: Array, rows: int) -> tuple[Array, Array]:
    """First row of block ``i``, moved up where it would reach past the last row, and which rows are its own [b 1]."""
    start = jnp.minimum(sweep.start[i], rows - sweep.block)
    index = start + jnp.arange(sweep.block, dtype=jnp.int32)
    return start, ((index >= sweep.start[i]) & (index < sweep.end[i]))[:, None]


def weight_gradient(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sum over each group's rows of rows^T cotangent: [m k], [m n] -> [e k n], in `sum_dtype`."""
    shape = (group_sizes.shape[0], rows.shape[1], cotangent.shape[1])
    if 0 in rows.shape or 0 in cotangent.shape:
        return jnp.zeros(shape, sum_dtype(rows.dtype))
    wide = cotangent.astype(sum_dtype(rows.dtype))
    total = vary_like(zeros(shape, wide, group_sizes), rows, cotangent, group_sizes)
    for sweep in sweeps(group_sizes, rows.shape[0]):
        body = functools.partial(_accumulate, sweep, rows, cotangent)
        total = lax.fori_loop(sweep.begin, sweep.stop, body, total)
    return total


def _accumulate(sweep: Sweep, rows: Array, cotangent: Array, i: Array, total: Array) -> Array:
    """Block ``i``'s part of its group's gradient: the last block writes it, whole blocks, which come later, add."""
    start, own = place(sweep, i, rows.shape[0])
    cut = lambda x: lax.dynamic_slice_in_dim(x, start, sweep.block)
    left, right = cut(rows), cut(cotangent)
    if not sweep.whole:
        left, right = jnp.where(own, left, 0), jnp.where(own, right, 0)
    contract = (((0,), (0,)), ((), ()))
    part = lax.dot_general(left, right, contract, preferred_element_type=total.dtype)
    group = sweep.group[i]
    if sweep.whole:
        part = part + lax.dynamic_index_in_dim(total, group, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, part, group, axis=0)
