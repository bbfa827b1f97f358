"""GPU form: kernels of our own in Pallas on Triton, whose time and memory are proportional to the listed blocks.

A program owns a tile of queries, or of keys in the backward pass, and loads the list's entries as it goes.
``selfcheck.py`` compares it with the portable form on a real GPU, and reads what ptxas says of it.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dyncomp_kernels._compat import out_like, vary_like
from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.lists import BlockLists, transposed
from dyncomp_kernels.sparse_attention.scores import LOG2E, LOW
from dyncomp_kernels.sparse_attention.triton_kernels import (
    Tiles,
    forward_kernel,
    key_kernel,
    query_kernel,
)
from dyncomp_kernels.sparse_attention.xla import Seeing

INTERPRETED = True
"""How the kernels run elsewhere than on CUDA."""

FORWARD, BACKWARD = (128, 64), (64, 64)
"""Queries and keys of a tile, at most."""


def supports(q: Any, k: Any, lists: BlockLists) -> str | None:
    """None where the kernels take these shapes and dtypes, else the reason why not."""
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        return f"triton takes bfloat16, not {q.dtype} and {k.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"triton takes heads of 64 or 128, not {q.shape[-1]}"
    if lists.unit not in (None, lists.columns):
        return f"triton takes whole blocks, not spans at multiples of {lists.unit}"
    if lists.rows % 16 or lists.columns % 16:
        return f"triton takes blocks in multiples of 16, not {lists.rows} by {lists.columns}"
    return None


def forward(
    q: Array, k: Array, v: Array, lists: BlockLists, offset: Array, real: Array | None,
    seeing: Seeing, interpret: bool = False,
) -> tuple[Array, Array]:  # fmt: skip
    """Output [b t h p] in the dtype of q, and log-sum-exp float32 [b t h]."""
    size = Layout.of(q, k, lists, seeing)
    tiles, queries = Tiles.of(size, *FORWARD), _flat(size, size.queries(q))
    shared = size.keys(k), size.keys(v), _real(size, real)
    args = offset.reshape(1), lists.index, lists.count, queries, *shared
    body = functools.partial(forward_kernel, size, tiles)
    outs = [(queries.shape, q.dtype), (queries.shape[:3], jnp.float32)]
    grid = size.x * size.n // tiles.queries, size.u, size.b
    out, lse = _call("sparse_attention_forward", body, grid, outs, args, size.p // 16, interpret)
    return size.of_queries(out), size.of_queries(lse[..., None])[..., 0]


def backward(
    saved: tuple[Array, ...], lists: BlockLists, offset: Array, real: Array | None,
    d_out: Array, d_lse: Array, seeing: Seeing, interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q, k and v."""
    q, k, v, out, lse = saved
    size = Layout.of(q, k, lists, seeing)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    shift = jnp.where(jnp.isfinite(lse), lse * LOG2E, -LOW)  # weights of a blind row are 0
    tiles, flat = Tiles.of(size, *BACKWARD), functools.partial(_flat, size)
    numbers = [flat(size.queries(x[..., None]))[..., 0] for x in (shift, delta)]
    queries = flat(size.queries(q)), flat(size.queries(d_out.astype(q.dtype))), *numbers
    shared = size.keys(k), size.keys(v), _real(size, real)
    start, own = offset.reshape(1), lambda x: (x.shape, x.dtype)
    args = start, lists.index, lists.count, *queries, *shared
    body = functools.partial(query_kernel, size, tiles)
    grid = size.x * size.n // tiles.queries, size.u, size.b
    name = "sparse_attention_query_gradient"
    (d_q,) = _call(name, body, grid, [own(queries[0])], args, 4, interpret)
    back = transposed(lists, size.y)
    args = start, back.index, back.count, *shared, *queries
    body = functools.partial(key_kernel, size, tiles)
    grid = size.y * size.columns // tiles.keys, size.g, size.b
    outs = [own(x) for x in shared[:2]]
    d_k, d_v = _call(
        "sparse_attention_key_gradients", body, grid, outs, args, size.p // 16, interpret
    )
    return size.of_queries(d_q), size.of_keys(d_k), size.of_keys(d_v)


def _flat(size: Layout, x: Array) -> Array:
    """[b u x n ..] as [b u x*n ..]."""
    return x.reshape(size.b, size.u, size.x * size.n, *x.shape[4:])


def _real(size: Layout, real: Array | None) -> Array | None:
    """bool [b s']."""
    return None if real is None else jnp.pad(real, ((0, 0), (0, size.y * size.columns - size.s)))


def _call(name, body, grid, outs, args, warps: int, interpret: bool) -> Any:
    arrays = [x for x in args if x is not None]
    args = [None if x is None else vary_like(x, *arrays) for x in args]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        name=name,
        grid=grid,
        in_specs=[None if x is None else whole for x in args],
        out_specs=[whole] * len(outs),
        out_shape=[out_like(shape, dtype, *arrays) for shape, dtype in outs],
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
    )(*args)
