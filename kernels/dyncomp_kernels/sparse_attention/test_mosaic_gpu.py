"""The Hopper kernels without a GPU: lowered for CUDA (not compiled, not run), interpreted, chosen and refused."""

import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.sparse_attention import mosaic_gpu, selfcheck, xla
from dyncomp_kernels.sparse_attention.api import explain, sparse_attention
from dyncomp_kernels.sparse_attention.bench_gpu import random_causal
from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.lists import BlockLists, causal_lists, transposed
from dyncomp_kernels.sparse_attention.mosaic_pieces import dealt, ranked, start_of
from dyncomp_kernels.sparse_attention.selfcheck import Problem
from dyncomp_kernels.sparse_attention.test_pallas_triton import H100, shapes
from dyncomp_kernels.sparse_attention.test_sparse_attention import random_lists

try:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
except ImportError:
    gpu_callbacks = None

KERNELS = ("forward", "query_gradient", "key_gradients")


def both(q, k, v, lists, real=None, implementation="mosaic_gpu", **words):
    attend = lambda q, k, v: sparse_attention(
        q, k, v, lists, real=real, implementation=implementation, **words
    )[0]
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(out)


def exported(fn, *args):
    text = jax.export.export(jax.jit(fn), platforms=["cuda"])(*args).mlir_module()
    return {name for name in KERNELS if f"sparse_attention_{name}" in text}


RULES = ({}, {"causal": False}, {"window": 200, "sink": 3})


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("p", [64, 128])
def test_lowers_for_cuda_without_one(p, rule):
    fn = lambda *args: both(*args, **rule)
    real = jax.ShapeDtypeStruct((1, 1024), bool)
    with jax.sharding.use_abstract_mesh(H100):
        assert exported(fn, *shapes(p), real) == set(KERNELS)


def test_gradients_of_narrow_blocks_are_those_of_triton():
    q, k, v, _ = shapes()
    lists = causal_lists(1024, 1024, 128, 64)
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    export = jax.export.export(jax.jit(both), platforms=["cuda"], disabled_checks=checks)
    with jax.sharding.use_abstract_mesh(H100):
        text = export(q, k, v, lists).mlir_module()
    assert "sparse_attention_key_gradients" in text and "xla.gpu.triton" in text


def test_lowers_inside_shard_map():
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )
    spec = jax.sharding.PartitionSpec("data")
    fn = jax.shard_map(
        both, mesh=mesh, in_specs=(spec,) * 3 + (jax.sharding.PartitionSpec(),), out_specs=spec
    )
    assert exported(fn, *shapes()) == set(KERNELS)


def test_tiles_are_dealt_once_each_longest_first():
    lists = random_lists(1280, 1280, 2, 128, 128)
    most = lists.index.shape[-1]
    codes = mosaic_gpu.by_length(lists.count, most, jnp.int32(77))
    order, length = ranked(codes, jnp.arange(lists.count.size), most)
    assert start_of(codes) == 77
    assert sorted(np.asarray(order).tolist()) == list(range(lists.count.size))
    assert (np.diff(length) <= 0).all() and (lists.count.reshape(-1)[order] == length).all()
    items, sms = 23, 4
    turns = [dealt(jnp.int32(i), mine, sms, items) for mine in range(sms) for i in range(6)]
    assert sorted(int(item) for item, live in turns if live) == list(range(items))


@pytest.mark.parametrize(
    ("length", "parts", "blocks"),
    [(1024, 8, 256), (8192, 2, 512), (32_768, 1, 1024), (131_072, 1, 132)],
)
def test_tiles_of_keys_are_divided_where_they_are_few(length, parts, blocks):
    q, k = (jax.ShapeDtypeStruct((1, length, heads, 128), "bfloat16") for heads in (16, 4))
    wide = jax.ShapeDtypeStruct((1, 4, length // 128, 9), "int32")
    size = Layout.of(q, k, BlockLists(wide, None, 128, 128), xla.Seeing())
    plan = mosaic_gpu._key_plan(size)
    assert (plan.parts, plan.sms) == (parts, blocks)
    assert plan.key_items == parts * 4 * length // 128 and plan.halves % parts == 0


def test_without_parts_one_list_of_queries_outlasts_a_share_of_all():
    counts = transposed(random_causal(8192, 0.1), 64).count
    shared, longest = float(counts.sum()) / mosaic_gpu.SMS, int(counts.max())
    assert longest > 1.5 * shared and longest / 2 < shared


PROBLEMS = (
    Problem(300, 400, 4, 2, 64, 2, 128, 128, "bfloat16", padded=True),
    Problem(256, 256, 4, 1, 64, 4, 128, 128, "bfloat16", window=100),
    Problem(256, 256, 2, 1, 64, 1, 64, 128, "bfloat16", causal=False),
)


def with_registers(multiply):
    """The interpreter's wgmma, for a left factor in registers too: it knows factors in memory only."""
    product, lock = np.matmul, threading.Lock()

    def wgmma(*, a_allocation_key_as_array, a_transforms, **words):
        left = np.asarray(a_allocation_key_as_array)
        with lock:
            if left.ndim < 2:
                return multiply(a_allocation_key_as_array=left, a_transforms=a_transforms, **words)
            other = words["b_allocation_key_as_array"], words["b_transforms"]
            by_left = lambda _, right, dtype: product(left, right, dtype=dtype)
            with mock.patch.object(np, "matmul", by_left):
                return multiply(a_allocation_key_as_array=other[0], a_transforms=other[1], **words)

    return wgmma


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="from jax 0.11 on")
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_kernels_by_the_interpreter(problem, monkeypatch):
    """In an order that real blocks could take; a copy that may overtake its reader would be called a race."""
    monkeypatch.setattr(mosaic_gpu, "SMS", 2)
    monkeypatch.setattr(mosaic_gpu, "MANY", 4)  # the first problem's tiles of keys are more
    monkeypatch.setattr(gpu_callbacks, "wgmma", with_registers(gpu_callbacks.wgmma))
    for name in ("forward", "backward"):  # in the place of the form that serves a CPU
        own = getattr(mosaic_gpu, name)
        monkeypatch.setattr(xla, name, lambda *args, seeing, own=own: own(*args, seeing))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = selfcheck.errors(problem, "xla")
    assert max(found.values()) < selfcheck.LIMITS["bfloat16"]
    assert not gpu_callbacks.get_races().races_found


def test_the_portable_form_serves_other_platforms():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, n, 64)), "bfloat16") for n in (2, 1, 1))
    lists = causal_lists(256, 256, 128, 128)
    found, want = (
        jax.jit(functools.partial(both, implementation=name))(q, k, v, lists)
        for name in ("mosaic_gpu", "xla")
    )
    for own, other in zip(found, want, strict=True):
        assert (own == other).all()


def test_is_chosen_on_hopper_only():
    args = shapes()[0], shapes()[1], shapes()[3]
    assert explain(*args)["cuda"].startswith("triton serves")
    with jax.sharding.use_abstract_mesh(H100):
        assert explain(*args)["cuda"] == "mosaic_gpu serves"
        fn = lambda *args: both(*args, implementation=None)
        assert exported(fn, *shapes()) == set(KERNELS)
        narrow = causal_lists(1024, 1024, 32, 32)
        said = explain(*args[:2], narrow)["cuda"]
    assert said.startswith("triton serves; mosaic_gpu takes blocks in multiples of 64")


def test_says_what_fits_and_refuses_the_rest():
    q, k, _, lists = shapes()
    supports = lambda *args: mosaic_gpu.supports(*args)
    assert supports(q, k, lists) is None
    assert "takes bfloat16" in supports(*shapes(dtype="float32")[:2], lists)
    most = jax.ShapeDtypeStruct((1, 1, 8, 1 << 28), "int32")
    assert "fewer lists" in supports(q, k, BlockLists(most, lists.count, 128, 128))
    assert "heads of 64" in supports(*shapes(p=80)[:2], lists)
    assert "multiples of 64" in supports(q, k, shapes(rows=32)[3])
    alone = jax.ShapeDtypeStruct((1, 1024, 2, 128), "bfloat16")
    assert "128 queries of a block and group at a time, not 64" in supports(
        alone, k, shapes(rows=64)[3]
    )
    spans = BlockLists(lists.index, lists.count, 128, 128, unit=1)
    assert "not spans" in supports(q, k, spans)
    with pytest.raises(ValueError, match="takes bfloat16"):
        sparse_attention(*(jnp.ones((1, 1024, 2, 64)),) * 3, lists, implementation="mosaic_gpu")
