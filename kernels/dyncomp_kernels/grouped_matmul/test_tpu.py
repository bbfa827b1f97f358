"""Compiled for described TPUs, without one; not run."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dyncomp_kernels.grouped_matmul.api import grouped_matmul
from dyncomp_kernels.grouped_matmul.selfcheck import flop_ratios

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler"),
]
M, K, N, E = 4096, 512, 1024, 8


def devices(name):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def shapes(dtype, sharding, copies=1):
    make = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    rows, weights = make((copies * M, K), dtype), make((copies * E, K, N), dtype)
    return rows, weights, make((copies * E,), jnp.int32)


def loss(rows, weights, sizes):
    return jnp.sum(jnp.square(grouped_matmul(rows, weights, sizes).astype(jnp.float32)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_work_and_memory_are_the_ideal_ones(chip, dtype):
    one = jax.sharding.SingleDeviceSharding(devices(chip)[0])
    rows, weights, sizes = shapes(dtype, one)
    ratios = flop_ratios(rows, weights, np.full(E, M // E), sharding=one)
    assert all(0.99 < ratio < 1.05 for ratio in ratios.values()), ratios
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = step.lower(rows, weights, sizes).compile()
    assert (
        compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4
    )  # tables, three products
    memory, itemsize = compiled.memory_analysis(), jnp.dtype(dtype).itemsize
    product = M * N * (4 + itemsize)  # as the native kernel gives it, and its cotangent
    weights_gradient = 4 * E * K * N
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 0.1 * moved + product + weights_gradient


def test_under_a_mesh_of_four():
    mesh = Mesh(np.array(devices("v5e:2x2")).reshape(4), ("data",))
    spec = PartitionSpec("data")
    body = lambda *args: jax.tree.map(lambda x: x[None], jax.grad(loss, (0, 1))(*args))
    fn = jax.shard_map(body, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    args = shapes("bfloat16", NamedSharding(mesh, spec), copies=4)
    text = jax.jit(fn).lower(*args).compile().as_text()
    assert "grouped_row_gradient" in text and "grouped_weight_gradient" in text
