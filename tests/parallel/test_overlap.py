"""The schedule that the TPU compiler makes of an exchange in chunks (needs the TPU compiler, no TPU)."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dyncomp.core.plans import RoutePlan
from dyncomp.experts import Exchange, MLPBank, MoE
from dyncomp.parallel import MeshSpec, hlo, use
from dyncomp.parallel.topology import compile_step, find
from dyncomp.routers import TopK

tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")
N, D, F, E = 8 * 4096, 1024, 2048, 8


def schedule(kind, chunks):
    """The text of one layer's forward pass on eight v5e chips, one expert each."""
    router = functools.partial(TopK, k=1)
    exchange = Exchange(chunks=chunks)
    moe = MoE(router, E, F, bank=MLPBank, dispatch=kind, capacity_factor=1.0, exchange=exchange)
    mesh = MeshSpec(expert=8).build(find("v5e:2x4").devices)

    def shape(*sizes, dtype=jnp.bfloat16):
        where = NamedSharding(mesh, PartitionSpec("expert"))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    def forward(x, plan, up, up_bias, down, down_bias):
        return moe._run(RoutePlan(*plan), x, MLPBank(up, up_bias, down, down_bias))[0]

    plan = shape(N, 1, dtype=jnp.int32), shape(N, 1, dtype=jnp.float32), shape(N, 1, dtype=bool)
    bank = shape(E, D, F), shape(E, F), shape(E, F, D), shape(E, D)
    with use(mesh):
        lowered = jax.jit(forward).lower(shape(N, D), plan, *bank)
        return compile_step(lowered, mesh).as_text()


def overlapped(text):
    """All-to-alls with a matrix product between their start and their done, and how many there are."""
    entry = text[text.index("ENTRY") :].splitlines()
    bodies = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.S | re.M))
    product = lambda line: any(
        " convolution(" in bodies.get(name, "") for name in re.findall(r"calls=%([\w.\-]+)", line)
    )
    running, hidden, count = {}, 0, 0
    for line in entry:
        if found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = .* all-to-all-start\(", line):
            running[found[1]], count = False, count + 1
        elif found := re.search(r" all-to-all-done\(%([\w.\-]+)\)", line):
            hidden += running.pop(found[1])
        elif product(line):
            running = dict.fromkeys(running, True)
    return hidden, count


@tpu
@pytest.mark.peers
def test_chunks_of_an_all_to_all_run_beside_the_experts():
    """Of d = 4 pieces each way, the first to go and the last to come back have nothing to hide behind."""
    hidden, count = overlapped(schedule("capacity", 4))
    assert count == 8 and hidden >= 4
    assert overlapped(schedule("capacity", 1))[0] == 0


@tpu
@pytest.mark.peers
def test_rows_of_uneven_number_travel_ragged_on_a_tpu():
    sent = hlo.collectives(schedule("dropless", 1))
    assert sent["ragged-all-to-all"].sites == 2
    assert sent["all-to-all"].bytes == E * 4 + 8 * 4  # counts and offsets
