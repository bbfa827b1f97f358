"""TPU form: kernels of our own, whose time and memory are proportional to the listed blocks.

A grid step is a block of queries of all heads that share a list and a key/value head. In it a loop goes through the
list alone; its blocks of keys come by copies of their own, the next ones while one is computed with (`tpu_walk`). Of
the lists, two at a time are in scalar memory, so that no length of the sequence is too large for it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dyncomp_kernels._compat import out_like, vary_like
from dyncomp_kernels.sparse_attention import xla
from dyncomp_kernels.sparse_attention.layout import Layout, rows_of_lists
from dyncomp_kernels.sparse_attention.lists import BlockLists, transposed
from dyncomp_kernels.sparse_attention.scores import LOG2E, LOW
from dyncomp_kernels.sparse_attention.tpu_backward import key_kernel, query_kernel
from dyncomp_kernels.sparse_attention.tpu_forward import forward_kernel
from dyncomp_kernels.sparse_attention.tpu_pieces import LANES
from dyncomp_kernels.sparse_attention.tpu_walk import Steps
from dyncomp_kernels.sparse_attention.xla import Seeing

INTERPRETED = pltpu.InterpretParams()
"""How the kernels run elsewhere than on a TPU."""

VMEM_BYTES = 64 * 2**20
"""Of the 128 MiB of a v5e or v6e."""


def supports(q: Any, k: Any, lists: BlockLists) -> str | None:
    """None where the kernels take these shapes and dtypes, else the reason why not."""
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"pallas takes float32 or bfloat16 alike, not {q.dtype} and {k.dtype}"
    if q.shape[-1] not in (64, 128, 256):
        return f"pallas takes heads of 64, 128 or 256, not {q.shape[-1]}"
    if lists.unit not in (None, lists.columns):
        return f"pallas takes whole blocks, not spans at multiples of {lists.unit}"
    if lists.rows % 64 or lists.columns % 64:
        return f"pallas takes blocks in multiples of 64, not {lists.rows} by {lists.columns}"
    return None


def forward(
    q: Array, k: Array, v: Array, lists: BlockLists, offset: Array, real: Array | None,
    seeing: Seeing, interpret: Any = False,
) -> tuple[Array, Array]:  # fmt: skip
    """Output [b t h p] in the dtype of q, and log-sum-exp float32 [b t h]."""
    size = Layout.of(q, k, lists, seeing)
    steps, rows = Steps.of(size.columns, size.m), rows_of_lists(lists)
    queries, marks = size.queries(q), _marks(size, real)
    shared = size.keys(k), size.keys(v), marks
    args = offset.reshape(1), rows, rows, queries, *shared
    block, numbers = _row((size.n, size.p)), _row((1, size.n))
    like = q, k, v, lists.index
    floats = (*queries.shape[:3], 1, size.n)
    outs = [out_like(queries.shape, q.dtype, *like), out_like(floats, jnp.float32, *like)]
    spec = {
        "grid": (size.b, size.u, size.x),
        "in_specs": [*_listed(size), block, *_anywhere(shared)],
        "out_specs": [block, numbers],
        "scratch_shapes": [
            *(_floats(size.n, w) for w in (LANES, LANES, size.p)),
            *_streams(steps.places, shared),
        ],
    }
    body = functools.partial(forward_kernel, size, steps)
    out, lse = _call("sparse_attention_forward", body, spec, outs, args, 4, size, interpret)
    return size.of_queries(out), size.of_queries(lse.swapaxes(-1, -2))[..., 0]


def backward(
    saved: tuple[Array, ...], lists: BlockLists, offset: Array, real: Array | None,
    d_out: Array, d_lse: Array, seeing: Seeing, interpret: Any = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q, k and v; by the portable form where a group has no multiple of 128 rows in a block.

    There the compiler has to shift numbers of queries across lanes, and did not finish within minutes.
    """
    q, k, v, out, lse = saved
    size = Layout.of(q, k, lists, seeing)
    if not interpret and size.n % LANES:
        return xla.backward(saved, lists, offset, real, d_out, d_lse, seeing)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    shift = jnp.where(jnp.isfinite(lse), lse * LOG2E, -LOW)  # weights of a blind row are 0
    stats = jnp.concatenate([size.rows_of(shift), size.rows_of(delta)], axis=-2)
    queries = size.queries(q), size.queries(d_out.astype(q.dtype)), stats
    shared = size.keys(k), size.keys(v), _marks(size, real)
    start = offset.reshape(1)
    d_q = _query_gradient(size, lists, start, queries, shared, interpret)
    d_k, d_v = _key_gradients(size, lists, start, queries, shared, interpret)
    return size.of_queries(d_q), size.of_keys(d_k), size.of_keys(d_v)


def _query_gradient(size, lists, start, queries, shared, interpret: Any) -> Array:
    steps, rows = Steps.of(size.columns, size.m), rows_of_lists(lists)
    block, numbers = _row((size.n, size.p)), _row((2, size.n))
    args = start, rows, rows, *queries, *shared
    spec = {
        "grid": (size.b, size.u, size.x),
        "in_specs": [*_listed(size), block, block, numbers, *_anywhere(shared)],
        "out_specs": block,
        "scratch_shapes": [
            *(_floats(size.n, w) for w in (LANES, LANES, size.p)),
            *_streams(steps.places, shared),
        ],
    }
    outs = out_like(queries[0].shape, queries[0].dtype, *jax.tree.leaves(args))
    body = functools.partial(query_kernel, size, steps)
    return _call("sparse_attention_query_gradient", body, spec, outs, args, 6, size, interpret)


def _key_gradients(size, lists, start, queries, shared, interpret: Any) -> tuple[Array, Array]:
    steps, rows = Steps.of(size.n, size.x), rows_of_lists(transposed(lists, size.y))
    groups = size.u // size.g
    whole = lambda width: pl.BlockSpec((None, None, size.columns, width), lambda b, g, y, e: (b, g, y, 0))  # fmt: skip
    marks = pl.BlockSpec((None, size.columns, LANES), lambda b, g, y, e: (b, y, 0))

    def listed(skip: int) -> pl.BlockSpec:
        def place(b, g, y, e):
            turn = jnp.minimum(y * groups + e + skip, size.y * groups - 1)
            group = g * groups + lax.rem(turn, groups)
            return b if size.w > 1 else 0, group if size.a > 1 else 0, lax.div(turn, groups), 0, 0

        shape = (None, None, None, 1, 1 + size.x)
        return pl.BlockSpec(shape, place, memory_space=pltpu.SMEM)

    flat = lambda x: x.reshape(size.b, size.u, size.x * size.n, size.p)
    streamed = flat(queries[0]), flat(queries[1]), queries[2]
    args = start, rows, rows, *shared, *streamed
    wide = whole(size.p)
    buffers, *rest = _streams(steps.places, streamed[:2])
    buffers.append(pltpu.VMEM((2, steps.wide, 2, size.n), jnp.float32))
    spec = {
        "grid": (size.b, size.g, size.y, groups),
        "in_specs": [
            pl.BlockSpec(memory_space=pltpu.SMEM), listed(0), listed(1),
            wide, wide, None if shared[2] is None else marks, *_anywhere(streamed),
        ],
        "out_specs": [wide, wide],
        "scratch_shapes": [
            *(_floats(size.columns, size.p) for _ in range(2)), buffers, *rest
        ],
    }  # fmt: skip
    outs = [out_like(x.shape, x.dtype, *jax.tree.leaves(args)) for x in shared[:2]]
    body = functools.partial(key_kernel, size, steps)
    return _call("sparse_attention_key_gradients", body, spec, outs, args, 8, size, interpret)


def _row(width: tuple[int, int]) -> pl.BlockSpec:
    """What belongs to a block of queries of a group."""
    return pl.BlockSpec((None, None, None, *width), lambda b, u, x: (b, u, x, 0, 0))


def _listed(size: Layout) -> list[pl.BlockSpec]:
    """The offset, the list of a block of queries and the one after it, in scalar memory."""

    def one(skip: int) -> pl.BlockSpec:
        def place(b, u, x):
            after = jnp.minimum(x + skip, size.x - 1)
            return b if size.w > 1 else 0, u if size.a > 1 else 0, after, 0, 0

        shape = (None, None, None, 1, 1 + size.m)
        return pl.BlockSpec(shape, place, memory_space=pltpu.SMEM)

    return [pl.BlockSpec(memory_space=pltpu.SMEM), one(0), one(1)]


def _anywhere(arrays: Any) -> list[pl.BlockSpec | None]:
    """Arrays that stay in slow memory."""
    return [None if x is None else pl.BlockSpec(memory_space=pl.ANY) for x in arrays]


def _floats(rows: int, width: int) -> Any:
    return pltpu.VMEM((rows, width), jnp.float32)


def _streams(places: int, arrays: Any) -> list[Any]:
    """Room for two steps of each array, what counts their copies, and the state of the chain."""
    room = [pltpu.VMEM((2, places, x.shape[-1]), x.dtype) for x in arrays if x is not None]
    return [room, pltpu.SemaphoreType.DMA((3, 2)), pltpu.SMEM((2,), jnp.int32)]


def _marks(size: Layout, real: Array | None) -> Array | None:
    """Real keys as bfloat16 [b s' 128], 1 or 0."""
    if real is None:
        return None
    real = jnp.pad(real, ((0, 0), (0, size.y * size.columns - size.s)))
    return jnp.broadcast_to(real[..., None], (*real.shape, LANES)).astype(jnp.bfloat16)


def _call(name, body, spec, outs, args, products: int, size: Layout, interpret: Any) -> Any:
    """``products`` counts the FLOPs of a pair of places and a feature; XLA is told of full lists."""
    arrays = [x for x in args if x is not None]
    args = [None if x is None else vary_like(x, *arrays) for x in args]
    pairs = size.b * size.h * size.x * size.m * size.rows * size.columns
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, outs)))
    grid = spec["grid"]
    order = ("parallel", "parallel") + ("arbitrary",) * (len(grid) - 2)
    return pl.pallas_call(
        body,
        name=name,
        out_shape=outs,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * pairs * size.p, bytes_accessed=moved, transcendentals=pairs
        ),
        **spec,
    )(*args)
