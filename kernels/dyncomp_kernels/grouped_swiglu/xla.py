"""Portable form: one loop over blocks of rows runs the whole expert on each, and touches nothing but rows in use.

Three grouped products in a row would also read, activate and write the rows that no group uses, and the hidden values
would travel through memory between them. Blocks, and why they are as they are: `grouped_matmul.blocks` and `.xla`.

The backward pass needs gate and up products; the forward pass keeps them, [m f] each, where a gradient is wanted.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels._widths import sum_dtype
from dyncomp_kernels.grouped_matmul.blocks import Sweep, sweeps
from dyncomp_kernels.grouped_matmul.xla import place, zeros


class Weights(NamedTuple):
    """gate, up [e d f] and down [e f d]."""

    gate: Array
    up: Array
    down: Array

    def of(self, group: Array) -> "Weights":
        """One group's."""
        return Weights(*(lax.dynamic_index_in_dim(w, group, keepdims=False) for w in self))


def forward(rows: Array, weights: Weights, group_sizes: Array) -> Array:
    """The experts' outputs [m d]; rows past the last group give zeros."""
    (out,) = _forward(rows, weights, group_sizes, kept=False)
    return out


def forward_and_kept(rows: Array, weights: Weights, group_sizes: Array) -> tuple[Array, ...]:
    """Three arrays: `forward`, and the gate and up products [m f] of the rows in use."""
    return _forward(rows, weights, group_sizes, kept=True)


def _forward(rows: Array, weights: Weights, group_sizes: Array, kept: bool) -> tuple[Array, ...]:
    shapes = [(rows.shape[0], weights.down.shape[2])]
    if kept:
        shapes += [(rows.shape[0], weights.gate.shape[2])] * 2
    out = _buffers(shapes, rows, weights, group_sizes, rows.dtype)
    for sweep in _sweeps(rows, weights, group_sizes):
        body = functools.partial(_expert, sweep, rows, weights)
        out = lax.fori_loop(sweep.begin, sweep.stop, body, out)
    return out


def _expert(sweep: Sweep, rows: Array, weights: Weights, i: Array, out: tuple) -> tuple:
    """Block ``i`` of the sweep through its group's expert."""
    start, own = place(sweep, i, rows.shape[0])
    tile, w = lax.dynamic_slice_in_dim(rows, start, sweep.block), weights.of(sweep.group[i])
    gate, up = _dot(tile, w.gate, 1, 0), _dot(tile, w.up, 1, 0)
    hidden = (jax.nn.silu(gate) * up).astype(rows.dtype)
    values = (_dot(hidden, w.down, 1, 0), gate, up)[: len(out)]
    return tuple(_put(sweep, own, start, *pair) for pair in zip(out, values, strict=True))


def backward(
    rows: Array, weights: Weights, group_sizes: Array, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Weights]:
    """Gradients of the rows [m d] and, in `sum_dtype`, of the weights."""
    d_rows = _buffers([rows.shape], rows, weights, group_sizes, rows.dtype)
    shapes = [w.shape for w in weights]
    total = (*d_rows, *_buffers(shapes, rows, weights, group_sizes, sum_dtype(rows.dtype)))
    for sweep in _sweeps(rows, weights, group_sizes):
        body = functools.partial(_pull, sweep, rows, weights, kept, cotangent)
        total = lax.fori_loop(sweep.begin, sweep.stop, body, total)
    return total[0], Weights(*total[1:])


def _pull(sweep, rows, weights, kept, cotangent, i, total):
    """Block ``i``'s row gradients, and its part of its group's weight gradients."""
    start, own = place(sweep, i, rows.shape[0])
    cut = lambda x: _own(sweep, own, lax.dynamic_slice_in_dim(x, start, sweep.block))
    x, dy, gate, up = map(cut, (rows, cotangent, *kept))
    group = sweep.group[i]
    w, wide = weights.of(group), sum_dtype(rows.dtype)
    gate, up = gate.astype(wide), up.astype(wide)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_hidden = _dot(dy, w.down, 1, 1)
    d_gate = (d_hidden * up * (sigmoid + silu * (1 - sigmoid))).astype(x.dtype)
    d_up = (d_hidden * silu).astype(x.dtype)
    hidden = (silu * up).astype(x.dtype)
    d_x = _dot(d_gate, w.gate, 1, 1) + _dot(d_up, w.up, 1, 1)
    parts = _dot(x, d_gate, 0, 0), _dot(x, d_up, 0, 0), _dot(hidden, dy, 0, 0)
    if sweep.whole:  # comes after the group's last block, which wrote
        parts = [
            part + lax.dynamic_index_in_dim(so_far, group, keepdims=False)
            for part, so_far in zip(parts, total[1:], strict=True)
        ]
    added = [
        lax.dynamic_update_index_in_dim(so_far, part, group, axis=0)
        for part, so_far in zip(parts, total[1:], strict=True)
    ]
    return (_put(sweep, own, start, total[0], d_x), *added)


def _dot(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """Contracts one axis of each, accumulated in `sum_dtype`."""
    axes, wide = (((of_a,), (of_b,)), ((), ())), sum_dtype(a.dtype)
    return lax.dot_general(a, b, axes, preferred_element_type=wide)


def _own(sweep: Sweep, own: Array, tile: Array) -> Array:
    """Zeros in the rows of other groups."""
    return tile if sweep.whole else jnp.where(own, tile, 0)


def _put(sweep: Sweep, own: Array, start: Array, out: Array, value: Array) -> Array:
    """``out`` with the block's own rows written."""
    value = value.astype(out.dtype)
    if not sweep.whole:
        value = jnp.where(own, value, lax.dynamic_slice_in_dim(out, start, sweep.block))
    return lax.dynamic_update_slice_in_dim(out, value, start, axis=0)


def _sweeps(rows: Array, weights: Weights, group_sizes: Array) -> tuple[Sweep, ...]:
    if 0 in rows.shape or any(0 in w.shape for w in weights):
        return ()
    return sweeps(group_sizes, rows.shape[0])


def _buffers(shapes, rows: Array, weights: Weights, group_sizes: Array, dtype) -> tuple[Array, ...]:
    """Zeros to write into, each a buffer of its own."""
    like = rows, *weights, group_sizes
    if any(0 in x.shape for x in like):
        return tuple(vary_like(jnp.zeros(shape, dtype), *like) for shape in shapes)
    return tuple(
        vary_like(zeros(shape, weights[n % 3].astype(dtype), group_sizes), *like)
        for n, shape in enumerate(shapes)
    )
