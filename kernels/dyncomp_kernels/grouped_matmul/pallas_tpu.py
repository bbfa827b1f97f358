"""TPU form: forward by XLA's native kernel, both gradients by our own kernels.

Why, as compiled by the libtpu that jax 0.10.2 pins: native `ragged_dot` counts the ideal FLOPs, but its weight gradient
is compiled densely, as many times the ideal as there are groups, and its row gradient transposes the weights first.
megablox has both gradients, but its outputs carry no mesh axes, so that `shard_map` refuses it, and it pads every group
to its tile. ``docs/bench/tpu.py`` reads the FLOPs and the static schedules; docs/benchmarks.md has what it printed.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dyncomp_kernels._compat import out_like, vary_like
from dyncomp_kernels.grouped_matmul import ragged
from dyncomp_kernels.grouped_matmul.visits import Visits, own_rows, visits

LANES = 128
WEIGHT_BYTES = 2**21
"""A tile of weights: two of them, double-buffered, and the rest fit the 16 MiB of a v5e's scoped memory."""

forward = ragged.forward


def supports(rows, weights) -> str | None:
    """None where the kernels take these shapes, else the reason why not."""
    k, n = weights.shape[1:]
    if k % LANES or n % LANES or not rows.shape[0]:
        return f"pallas takes k and n in multiples of {LANES} and at least one row, not k={k}, n={n}, m={rows.shape[0]}"
    if n * LANES * rows.dtype.itemsize > WEIGHT_BYTES:
        return f"pallas keeps all n columns of {LANES} weights in {WEIGHT_BYTES} bytes; n={n} is too large"
    return None


def _fit(size: int, limit: int) -> int:
    """The largest tile that divides ``size``, a multiple of 128 up to ``limit``."""
    return max(t for t in range(LANES, max(limit, LANES) + 1, LANES) if size % t == 0)


def weight_gradient(
    rows: Array, cotangent: Array, group_sizes: Array, interpret: bool = False
) -> Array:
    """Sum over each group's rows of rows^T cotangent: [m k], [m n] -> [e k n], float32."""
    (m, k), n = rows.shape, cotangent.shape[1]
    tile, tile_k, tile_n = 512 if m >= 512 else 128, _fit(k, 512), _fit(n, 1024)
    tables = visits(group_sizes, m, tile)
    grid = n // tile_n, k // tile_k, tables.group.shape[0]
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        in_specs=[
            pl.BlockSpec((tile, tile_k), lambda j, i, v, *t: (t[1][v], i)),
            pl.BlockSpec((tile, tile_n), lambda j, i, v, *t: (t[1][v], j)),
        ],
        out_specs=pl.BlockSpec((None, tile_k, tile_n), lambda j, i, v, *t: (t[0][v], i, j)),
        grid=grid,
        scratch_shapes=[pltpu.VMEM((tile_k, tile_n), jnp.float32)],
    )
    out = out_like((group_sizes.shape[0], k, n), jnp.float32, rows, cotangent, group_sizes)
    kernel = functools.partial(_weight_kernel, tile)
    return _call(
        "grouped_weight_gradient",
        kernel,
        spec,
        out,
        (tables, rows, cotangent),
        2 * m * k * n,
        interpret,
    )


def _weight_kernel(tile, group, at, start, end, total, left, right, out, acc):
    """Grid (n, k, visits): adds up a group's tiles, and writes at its last visit."""
    v = pl.program_id(2)
    tables = Visits(group, at, start, end, total)
    last = total[0] - 1
    before, after = group[jnp.maximum(v - 1, 0)], group[jnp.minimum(v + 1, last)]

    @pl.when((v == 0) | (before != group[v]))
    def _():
        acc[...] = jnp.zeros_like(acc)

    def add(a, b):
        contract = (((0,), (0,)), ((), ()))
        acc[...] += lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    first, stop = start[group[v]], end[group[v]]
    used = (v <= last) & (stop > first)
    whole = (first <= at[v] * tile) & (stop >= (at[v] + 1) * tile)

    @pl.when(used & whole)
    def _():
        add(left[...], right[...])

    @pl.when(used & ~whole)
    def _():
        own = own_rows(v, tables, tile)  # of both: 0 x nan of another group's row is nan
        add(jnp.where(own, left[...], 0), jnp.where(own, right[...], 0))

    @pl.when((v == last) | ((v < last) & (after != group[v])))
    def _():
        out[...] = acc[...]


def row_gradient(
    cotangent: Array, weights: Array, group_sizes: Array, interpret: bool = False
) -> Array:
    """cotangent [m n] x weights [e k n] transposed, by group -> [m k]; rows past the last group give zeros."""
    (m, n), (e, k, _) = cotangent.shape, weights.shape
    tile = 256 if m >= 512 * e else 128
    tile_k = _fit(k, WEIGHT_BYTES // (n * weights.dtype.itemsize))
    unused = m - jnp.sum(group_sizes, dtype=jnp.int32)
    tables = visits(jnp.append(group_sizes, unused), m, tile)
    weight = lambda i, v, *t: (jnp.minimum(t[0][v], e - 1), i, 0)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        in_specs=[
            pl.BlockSpec((tile, n), lambda i, v, *t: (t[1][v], 0)),
            pl.BlockSpec((None, tile_k, n), weight),
        ],
        out_specs=pl.BlockSpec((tile, tile_k), lambda i, v, *t: (t[1][v], i)),
        grid=(k // tile_k, tables.group.shape[0]),
    )
    out = out_like((m, k), cotangent.dtype, cotangent, weights, group_sizes)
    kernel = functools.partial(_row_kernel, tile, e)
    return _call(
        "grouped_row_gradient",
        kernel,
        spec,
        out,
        (tables, cotangent, weights),
        2 * m * k * n,
        interpret,
    )


def _row_kernel(tile, groups, group, at, start, end, total, left, right, out):
    """Grid (k, visits): fills the rows of the visit's group, with zeros for the group past the last."""
    v = pl.program_id(1)
    tables = Visits(group, at, start, end, total)
    some = (v < total[0]) & (end[group[v]] > start[group[v]])

    @pl.when(some & (group[v] < groups))
    def _():
        contract = (((1,), (1,)), ((), ()))
        part = lax.dot_general(left[...], right[...], contract, preferred_element_type=jnp.float32)
        out[...] = jnp.where(own_rows(v, tables, tile), part.astype(out.dtype), out[...])

    @pl.when(some & (group[v] == groups))
    def _():
        out[...] = jnp.where(own_rows(v, tables, tile), jnp.zeros_like(out), out[...])


def _call(name, kernel, spec, out, args, flops: int, interpret: bool) -> Array:
    tables, left, right = args
    moved = left.size * left.dtype.itemsize + right.size * right.dtype.itemsize
    moved += out.size * jnp.dtype(out.dtype).itemsize
    inputs = [vary_like(x, *tables, left, right) for x in (*tables, left, right)]
    order = ("parallel",) * (len(spec.grid) - 1) + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=out,
        grid_spec=spec,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
    )(*inputs)
