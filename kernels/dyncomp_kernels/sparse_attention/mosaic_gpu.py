"""Hopper form (H100, H200): kernels of our own in Pallas on Mosaic GPU; bfloat16, sums in float32.

Arrays are read and written where they are: nothing is transposed or copied but to pad what is no whole block.
``selfcheck.py`` compares it with float64 on a real GPU, ``bench_gpu.py`` times it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels.sparse_attention import pallas_triton
from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of, transposed
from dyncomp_kernels.sparse_attention.mosaic_backward import key_kernel, query_kernel
from dyncomp_kernels.sparse_attention.mosaic_forward import forward_kernel
from dyncomp_kernels.sparse_attention.mosaic_pieces import (
    HALF,
    HALVES,
    HIDDEN,
    KEYS,
    PART,
    START,
    Plan,
)
from dyncomp_kernels.sparse_attention.xla import Seeing

SMS = 132
"""Multiprocessors of an H100 or H200 (SXM); with fewer the kernels are right but slower."""

FEW, MANY = 4, 8
"""Tiles of keys a multiprocessor: up to how many parts are made, and up to where each has threads of its own."""


def supports(q: Any, k: Any, lists: BlockLists) -> str | None:
    """None where the kernels take these shapes and dtypes, else the reason why not."""
    n = q.shape[2] // max(lists.index.shape[1], k.shape[2]) * lists.rows
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16:
        return f"mosaic_gpu takes bfloat16, not {q.dtype} and {k.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"mosaic_gpu takes heads of 64 or 128, not {q.shape[-1]}"
    if lists.unit not in (None, lists.columns):
        return f"mosaic_gpu takes whole blocks, not spans at multiples of {lists.unit}"
    if lists.rows % HALF or lists.columns % HALF:
        return (
            f"mosaic_gpu takes blocks in multiples of {HALF}, not {lists.rows} by {lists.columns}"
        )
    if n % (HALVES * HALF):
        return f"mosaic_gpu takes {HALVES * HALF} queries of a block and group at a time, not {n}"
    if not lists.index.size:
        return "mosaic_gpu takes lists that may hold a block"
    (_, a, x, most), (b, s, g, _) = lists.index.shape, k.shape
    groups = max(a, g)
    codes = max(b * groups * x * (most + 1), b * blocks_of(s, lists.columns) * (groups * x + g))
    return None if codes < 2**31 else f"mosaic_gpu takes fewer lists: {codes} codes of their order"


def on_hopper() -> bool:
    """Whether programs are traced for an H100 or H200: the GPU that a mesh tells, else that of this machine."""
    told = jax.sharding.get_abstract_mesh().abstract_device
    here = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else ""
    return any(name in (told.device_kind if told else here) for name in ("H100", "H200"))


def forward(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    offset: Array,
    real: Array | None,
    seeing: Seeing,
) -> tuple[Array, Array]:
    """Output [b t h p] in the dtype of q, and log-sum-exp float32 [b t h]."""
    size = Layout.of(q, k, lists, seeing)
    plan, long = Plan(size, SMS), size.x * size.rows
    queries, *rest = _padded(q, long), *_keys(plan, k, v, real)
    order = by_length(_counts(lists.count, size), size.m, offset)
    args = order, lists.index, queries, *rest
    outs = [(queries.shape, q.dtype), ((size.b, size.h, long), jnp.float32)]
    out, lse = _call("sparse_attention_forward", forward_kernel, plan, outs, args)
    return out[:, : size.t], lse[..., : size.t].swapaxes(1, 2)


def backward(
    saved: tuple[Array, ...], lists: BlockLists, offset: Array, real: Array | None,
    d_out: Array, d_lse: Array, seeing: Seeing,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q, k and v."""
    q, k, v, out, lse = saved
    size = Layout.of(q, k, lists, seeing)
    if size.columns % KEYS:
        return pallas_triton.backward(saved, lists, offset, real, d_out, d_lse, seeing)
    plan, long = Plan(size, SMS), size.x * size.rows
    queries, outputs, d_outputs = (_padded(x.astype(q.dtype), long) for x in (q, out, d_out))
    sums = (_padded(x, long).swapaxes(1, 2) for x in (lse, d_lse))
    keys = _keys(plan, k, v, real)
    order = by_length(_counts(lists.count, size), size.m, offset)
    outs = [(queries.shape, q.dtype), ((size.b, size.h, 2, long), jnp.float32)]
    args = order, lists.index, queries, outputs, d_outputs, *sums, *keys
    d_q, numbers = _call("sparse_attention_query_gradient", query_kernel, plan, outs, args)
    back, plan = transposed(lists, size.y), _key_plan(size)
    counts = jnp.broadcast_to(back.count, (size.b, size.u, size.y))
    counts = counts.reshape(size.b, size.g, -1, size.y).sum(2)
    order = by_length(counts, size.u // size.g * size.x, offset)
    outs = [((plan.parts, *keys[0].shape), k.dtype)] * 2
    args = order, back.index, back.count, queries, d_outputs, numbers, *keys
    found = _call("sparse_attention_key_gradients", key_kernel, plan, outs, args)
    d_k, d_v = (x[0] if plan.parts == 1 else _added(x) for x in found)
    return d_q[:, : size.t], d_k[:, : size.s], d_v[:, : size.s]


def _key_plan(size: Layout) -> Plan:
    """How tiles of keys are divided.

    Where they are few, each in parts: else the longest list takes longer than all others' share. Where there are not
    many a multiprocessor, each in a block of threads of its own: the GPU starts the next where one is done, the longest
    first.
    """
    plan = Plan(size, SMS)
    while plan.halves % (2 * plan.parts) == 0 and 2 * plan.key_items <= FEW * SMS:
        plan = Plan(size, SMS, 2 * plan.parts)
    return Plan(size, plan.key_items, plan.parts) if plan.key_items <= MANY * SMS else plan


def _added(parts: Array) -> Array:
    return jnp.sum(parts.astype(jnp.float32), axis=0).astype(parts.dtype)


def by_length(counts: Array, most: int, offset: Array) -> Array:
    """One table, ascending: the first query's place - `START`, then blocks, those with the longest lists first.

    A block is (most - length of its list) x blocks + flat index; `ranked` and `start_of` read the table.
    """
    flat = counts.reshape(-1).astype(jnp.int32)
    place = jnp.arange(flat.size, dtype=jnp.int32)
    codes = jnp.append((most - flat) * flat.size + place, offset - START)
    return jnp.sort(codes, stable=False)


def _counts(count: Array, size: Layout) -> Array:
    return jnp.broadcast_to(count, (size.b, size.u, size.x))


def _keys(plan: Plan, k: Array, v: Array, real: Array | None) -> list[Array]:
    """Keys and values in whole blocks, and the marks of padding (`mosaic_pieces.masked`)."""
    long = plan.size.y * plan.size.columns
    found = [_padded(x, long) for x in (k, v)]
    if real is not None:
        shown, place = _padded(real, long), jnp.arange(long, dtype=jnp.int32)
        some = ~shown.reshape(plan.size.b, -1, plan.keys).all(-1)
        found += [jnp.where(shown, place, HIDDEN), some.astype(jnp.int32)]
    return found


def _padded(x: Array, length: int) -> Array:
    """[b s ..] with zeros at the end."""
    spare = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2))) if spare else x


def _call(name: str, body: Any, plan: Plan, outs: list[Any], args: Any) -> list[Array]:
    """Runs a kernel in persistent blocks of three warpgroups."""
    body = functools.partial(body, plan)
    body.__name__ = name  # pyrefly: ignore
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(*out) for out in outs),
        grid=(plan.sms,),
        grid_names=("sm",),
        num_threads=HALVES + 1,
        thread_name=PART,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
    )
    return [vary_like(x, *args) for x in kernel(*args)]
