"""Compiled for described TPUs, without one; not run. The work is what the lists say, counted without a TPU too."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of
from dyncomp_kernels.sparse_attention.tpu_walk import Steps
from dyncomp_kernels.sparse_attention.xla import Seeing

LONG = 131072


def needs_the_compiler(test):
    absent = importlib.util.find_spec("libtpu") is None
    return pytest.mark.peers(pytest.mark.skipif(absent, reason="no TPU compiler")(test))


def devices(name):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def shapes(t, h, g, p, a, size, longest, sharding, copies=1):
    make = lambda shape, dtype="bfloat16": jax.ShapeDtypeStruct(
        (copies, *shape), dtype, sharding=sharding
    )
    index = make((a, blocks_of(t, size), longest), "int32")
    lists = BlockLists(index, make((a, blocks_of(t, size)), "int32"), size, size)
    return make((t, h, p)), make((t, g, p)), make((t, g, p)), lists


def loss(q, k, v, lists):
    out, lse = sparse_attention(q, k, v, lists)
    return jnp.sum(jnp.square(out.astype(jnp.float32))) + jnp.sum(lse)


def compiled(fn, args):
    return jax.jit(fn).lower(*args).compile()


@needs_the_compiler
@pytest.mark.parametrize("a", [1, 2, 8])
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_memory_is_linear_at_131072_tokens(chip, a):
    """Blocks of 512, 10% of them listed: no table of pairs, nothing beyond copies of what goes in and comes out."""
    one = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    args = shapes(LONG, 8, 2, 128, a, 512, 26, one)
    found = compiled(sparse_attention, args)
    assert "sparse_attention_forward" in found.as_text()
    memory = found.memory_analysis()
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 1.5 * moved < 2**30


@needs_the_compiler
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_gradients_compile_at_131072_tokens(chip):
    one = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    args = shapes(LONG, 4, 2, 128, 2, 512, 26, one)
    found = compiled(jax.grad(loss, (0, 1, 2)), args)
    text = found.as_text()
    for name in ("forward", "query_gradient", "key_gradients"):
        assert f"sparse_attention_{name}" in text
    assert found.memory_analysis().temp_size_in_bytes < 2**31


@needs_the_compiler
def test_small_blocks_narrow_heads_and_padding_compile():
    one = jax.sharding.SingleDeviceSharding(devices("v5e:2x2")[0])
    args = shapes(LONG, 9, 3, 64, 3, 64, 256, one)
    real = jax.ShapeDtypeStruct((1, LONG), bool, sharding=one)
    call = lambda q, k, v, lists, real: sparse_attention(q, k, v, lists, real=real)
    assert "sparse_attention_forward" in compiled(call, (*args, real)).as_text()


@needs_the_compiler
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_under_a_mesh_of_four(chip):
    """Batch over two chips and heads over two, inside a `shard_map`."""
    mesh = Mesh(np.array(devices(chip)).reshape(2, 2), ("data", "heads"))
    tokens = PartitionSpec("data", None, "heads")
    own = PartitionSpec("data", "heads")
    args = shapes(8192, 8, 4, 128, 4, 512, 8, None, copies=2)
    lists = jax.tree.map(lambda _: own, args[3])
    specs = tokens, tokens, tokens, lists
    place = lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    args = jax.tree.map(place, args, specs)
    body = lambda *args: jax.grad(loss, (0, 1, 2))(*args)
    fn = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(tokens,) * 3)
    text = compiled(fn, args).as_text()
    assert "sparse_attention_forward" in text and "sparse_attention_key_gradients" in text


@pytest.mark.parametrize("size", [64, 128, 512])
def test_grid_steps_are_the_listed_blocks(size):
    """The pieces of every list cover its entries and nothing else: at 10% of 131072 tokens, 0% above the listed."""
    x = blocks_of(LONG, size)
    counts = np.random.default_rng(0).binomial(np.arange(x) + 1, 0.1)
    steps = Steps.of(size, int(counts.max()))
    executed = 0
    for count in counts:
        whole, left = divmod(int(count), steps.wide)
        executed += whole * steps.wide
        for piece in steps.sizes[1:]:
            executed += left // piece * piece
            left %= piece
    assert executed == counts.sum()


def test_only_two_lists_are_in_scalar_memory():
    """At 131072 tokens in blocks of 64, a full list takes 8 KiB: what is live is two of them, of 1 MiB."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    lists = BlockLists(shape((1, 32, 2048, 2048)), shape((1, 32, 2048)), 64, 64)
    tokens = jax.ShapeDtypeStruct((1, LONG, 32, 128), jnp.bfloat16)
    size = Layout.of(tokens, tokens, lists, Seeing())
    assert 2 * 2 * 4 * (1 + size.m) < 2**16  # own and next, each double-buffered
