"""Hopper form (H100, H200): three kernels of our own in Pallas on Mosaic GPU; bfloat16, accumulated in float32.

Results whose columns are a multiple of 256 come from the kernels of `mosaic_wide`, others from `mosaic_kernels`, which
follow jax's `ragged_dot_mgpu` and `transposed_ragged_dot_mgpu`. All differ from those so: tiles start where groups do
(`tiles`), and their tables come ready; rows past the last group are written as zeros by the same kernel; rows of other
groups never reach a weight gradient, not even as 0 x nan; results vary over the mesh axes of the arguments, so that
they trace inside `shard_map`; nothing asks for a GPU while tracing, nor for more than jax.

Checked against float64 by ``docs/bench/checks_gpu.py`` and timed by ``docs/bench/grouped_gpu.py``; docs/benchmarks.md
has what they printed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels.grouped_matmul import mosaic_wide
from dyncomp_kernels.grouped_matmul.mosaic_kernels import (
    INNER,
    LANES,
    STEPS,
    TILE,
    product_kernel,
    weight_kernel,
)
from dyncomp_kernels.grouped_matmul.tiles import ALIGNED, tiles

SMS = 132
"""Multiprocessors of an H100 or H200 (SXM); with fewer the kernels are right but slower."""


def supports(rows, weights) -> str | None:
    """None where the kernels take these shapes and dtypes, else the reason why not."""
    k, n = weights.shape[1:]
    if rows.dtype != jnp.bfloat16:
        return f"mosaic_gpu takes bfloat16, not {rows.dtype}"
    if k % LANES or n % LANES or not k or not n or not rows.shape[0] or not weights.shape[0]:
        wants = f"mosaic_gpu takes k and n in multiples of {LANES} and at least one row and group"
        return f"{wants}, not k={k}, n={n}, m={rows.shape[0]}, e={weights.shape[0]}"
    return None


def forward(rows: Array, weights: Array, group_sizes: Array) -> Array:
    """rows [m k] x weights [e k n] by group -> [m n]; rows past the last group give zeros."""
    return _product(rows, weights, group_sizes, transposed=False)


def row_gradient(cotangent: Array, weights: Array, group_sizes: Array) -> Array:
    """cotangent [m n] x weights [e k n] transposed, by group -> [m k]."""
    return _product(cotangent, weights, group_sizes, transposed=True)


def _product(rows: Array, weights: Array, group_sizes: Array, transposed: bool) -> Array:
    m = rows.shape[0]
    tables, padded = tiles(group_sizes, m, TILE), _padded(rows, TILE)
    out = (padded.shape[0], weights.shape[1 if transposed else 2])
    name = "grouped_row_gradient" if transposed else "grouped_forward"
    if out[1] % mosaic_wide.WIDE:
        body = functools.partial(product_kernel, transposed)
        return _call(name, body, SMS, out, *tables[:4], padded, weights)[:m]
    live = jnp.sum(tables.rows > 0, dtype=jnp.int32)[None]
    paired = out[1] % (2 * mosaic_wide.WIDE) == 0
    body = functools.partial(mosaic_wide.product_kernel, transposed, paired)
    return _wide(name, body, paired, out, live, *tables, padded, weights)[:m]


def weight_gradient(rows: Array, cotangent: Array, group_sizes: Array) -> Array:
    """Sum over each group's rows of rows^T cotangent: [m k], [m n] -> [e k n], bfloat16."""
    out = (group_sizes.shape[0], rows.shape[1], cotangent.shape[1])
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    args = ends - group_sizes, ends, _padded(rows, INNER), _padded(cotangent, INNER)
    if out[2] % mosaic_wide.WIDE == 0:
        paired = out[1] % (2 * LANES) == 0
        body = functools.partial(mosaic_wide.weight_kernel, paired)
        masked = (mosaic_wide.edges(x, *args[:2]) for x in args[2:])
        return _wide("grouped_weight_gradient", body, paired, out, *args, *masked)
    short = rows.shape[0] < 512 * out[0]  # much to write: another block computes meanwhile
    body = functools.partial(weight_kernel, 2 if short else STEPS)
    return _call("grouped_weight_gradient", body, 2 * SMS if short else SMS, out, *args)


def _padded(rows: Array, least: int) -> Array:
    """Rows as the kernels load them: a multiple of 8, at least one tile."""
    size = max(rows.shape[0] + -rows.shape[0] % ALIGNED, least)
    return jnp.pad(rows, ((0, size - rows.shape[0]), (0, 0)))


def _call(name: str, body, blocks: int, shape: tuple[int, ...], *args: Array, **threads) -> Array:
    """Runs ``body`` in so many persistent blocks, of one warpgroup if no ``threads`` are told."""
    body.__name__ = name
    warpgroup = plgpu.LoweringSemantics.Warpgroup
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        grid=(blocks,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=warpgroup),
        **threads,
    )
    return vary_like(kernel(*args), *args)


def _wide(name: str, body, paired: bool, shape: tuple[int, ...], *args: Array) -> Array:
    """Runs ``body`` in blocks of three warpgroups, two blocks a cluster if ``paired``."""
    threads = {"num_threads": mosaic_wide.HALVES + 1, "thread_name": mosaic_wide.PART}
    if paired:
        threads |= {"cluster": (2,), "cluster_names": (mosaic_wide.PAIR,)}
    return _call(name, body, SMS // (1 + paired), shape, *args, **threads)
