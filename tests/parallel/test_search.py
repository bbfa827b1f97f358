"""The model of a step's time against numbers by hand; meshes that are tried; what the command prints."""

import dataclasses
import functools
import importlib.util
import json
import math

import jax
import pytest

from dyncomp import attention, experts, models, routers, tasks
from dyncomp.cli.compile_run import mesh_of
from dyncomp.cli.main import main
from dyncomp.core.errors import DyncompError
from dyncomp.parallel import MeshSpec, hlo, search
from dyncomp.parallel.aot import state_bytes
from dyncomp.parallel.ops import Work
from dyncomp.parallel.report import CompileReport, Memory
from dyncomp.parallel.roofline import predict, said, shares
from dyncomp.parallel.rules import make_rules
from dyncomp.parallel.search import candidates, meshes, ranked, within
from dyncomp.parallel.topology import find
from dyncomp.training.optimizers import AdamW
from dyncomp.training.run import Run

GIB = 2**30


def report(flops=197e9, arguments=0, sent=0, fits=True, topology="v5e:4x4") -> CompileReport:
    memory = Memory(
        arguments=arguments, outputs=0, temporaries=0, aliased=0, code=0, peak=arguments
    )
    return CompileReport(
        topology=topology,
        mesh={"data": 16},
        devices=16,
        device_memory=16 * GIB,
        memory=memory,
        fits=fits,
        ledger_flops=int(flops),
        collectives={"all-gather": hlo.Traffic(1, 1, sent, sent)},
    )


def test_the_three_bounds_by_hand():
    """A v5e: 197 TFLOP/s, 820 GB/s; 400 GB/s on four links, both ways: 100 GB/s sent along one of two dimensions."""
    found = predict(report(flops=197e9, arguments=int(1.64e9), sent=int(3e8)))
    assert found.compute == pytest.approx(1e-3)
    assert found.memory == pytest.approx(2e-3)
    assert found.interconnect == pytest.approx(3e-3)
    assert found.binds == "interconnect"
    assert (found.overlapped, found.apart) == pytest.approx((3e-3, 6e-3))
    told = said(report(flops=197e9, arguments=int(1.64e9), sent=int(3e8)))
    assert told == "interconnect binds: 3.00 to 6.00 ms a step (model)"


def test_a_device_of_two_on_a_chip_has_half_of_it():
    whole = predict(report(topology="v4:2x2x1", flops=137.5e9))
    assert whole.compute == pytest.approx(1e-3)


def test_where_there_is_no_model():
    assert predict(report(topology="cpu:4")) is None
    refused = dataclasses.replace(report(fits=False), memory=None, refused="too large")
    assert predict(refused) is None and said(refused) == ""


def test_without_prices_the_compiled_products_count():
    work = {"product": Work(1, 1, flops=int(394e9)), "move": Work(1, 1, bytes=100)}
    bare = dataclasses.replace(report(), ledger_flops=None, work=work)
    assert predict(bare).compute == pytest.approx(2e-3)


def test_time_by_kind_is_the_longer_of_multiplying_and_moving():
    work = {
        "product": Work(1, 1, flops=int(197e9), bytes=int(0.82e9), cycles=1_503_000),
        "move": Work(2, 6, bytes=int(4.1e9)),
    }
    found = shares(dataclasses.replace(report(sent=int(3e8)), work=work))
    assert list(found) == ["move", "all-gather", "product"]
    assert found["move"].seconds == pytest.approx(5e-3)
    assert (found["move"].binds, found["move"].compiler) == ("memory", None)
    assert found["product"].seconds == pytest.approx(1e-3)
    # 4 units of 128 x 128 at 197 TFLOP/s: 1.503 GHz
    assert found["product"].compiler == pytest.approx(1e-3, rel=1e-3)
    assert found["all-gather"].binds == "interconnect"
    assert shares(report(topology="cpu:4")) == {}


def test_what_fits_comes_first_then_what_is_faster():
    slow, fast, large = report(flops=2e12), report(flops=1e12), report(flops=1e9, fits=False)
    assert ranked([large, slow, fast]) == [fast, slow, large]


@pytest.mark.parametrize(
    ("kind", "size", "group", "sent"),
    [
        ("all-gather", 80, 4, 60),
        ("reduce-scatter", 20, 4, 60),
        ("all-reduce", 80, 4, 120),
        ("all-to-all", 80, 4, 60),
        ("collective-permute", 80, 4, 80),
        ("all-gather", 80, 1, 0),
    ],
)
def test_what_a_ring_sends(kind, size, group, sent):
    assert hlo._sent(kind, size, group) == sent


def make_run(ffn, **fields) -> Run:
    mixer = functools.partial(attention.Attention, heads=4, kv_heads=2)
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=ffn)], 1)]
    model = models.DecoderLM(vocab_size=64, d_model=64, groups=groups)
    return Run(
        model=model, optimizer=AdamW(learning_rate=1e-3), steps=1,
        **{"batch_size": 4, "task": tasks.CodeLM(context=32), **fields},
    )  # fmt: skip


DENSE = functools.partial(experts.SwiGLU, hidden=96)
MOE = functools.partial(
    experts.MoE, router=functools.partial(routers.TopK, k=1), num_experts=4, hidden=48
)


def test_meshes_divide_the_batch():
    found = list(meshes(4, batch=4, experts=False))
    assert len(found) == 6  # data, fsdp and tensor share 2 x 2
    assert all(math.prod(sizes.values()) == 4 and sizes["expert"] == 1 for sizes in found)
    assert len(list(meshes(4, batch=4, experts=True))) == 10
    assert [sizes["tensor"] for sizes in meshes(4, batch=1, experts=True)] == [4]


def test_candidates_divide_the_parameters():
    """Two heads of keys: four parts of a tensor axis do not divide them."""
    found = candidates(make_run(DENSE), find("cpu:4"))
    assert {spec.tensor for spec in found} == {1, 2} and len(found) == 5
    assert {spec.expert for spec in candidates(make_run(MOE), find("cpu:4"))} == {1, 2, 4}
    with pytest.raises(DyncompError, match="no mesh of cpu:4 will do: .*tensor=4"):
        candidates(make_run(DENSE, batch_size=1, task=tasks.CodeLM(context=31)), find("cpu:4"))


def test_sequences_are_split_where_there_are_fewer_than_devices():
    found = candidates(make_run(DENSE, batch_size=2), find("cpu:4"))
    assert {(spec.data * spec.fsdp, spec.sequence, spec.tensor) for spec in found} == {
        *((2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2)),
    }


def test_candidates_hold_their_part_of_the_state():
    run, where = make_run(DENSE), find("cpu:4")
    program = run.program()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state))
    held = lambda spec: state_bytes(program, spec.build(where.devices), make_rules())
    assert held(MeshSpec(data=4)) == whole
    assert held(MeshSpec(data=1, fsdp=4)) == pytest.approx(whole / 4, rel=0.01)
    small = dataclasses.replace(where, memory=whole - 1)
    assert all(spec.data < 4 for spec in candidates(run, small))
    with pytest.raises(DyncompError, match="the state alone takes|not a multiple"):
        candidates(run, dataclasses.replace(where, memory=1))


def test_a_search_stops_after_its_minutes_and_says_what_is_left(monkeypatch):
    tried = []
    compiled = lambda run, topology, spec: tried.append(spec) or report()
    monkeypatch.setattr(search, "compile_run", compiled)
    specs = [MeshSpec(data=4), MeshSpec(fsdp=2), MeshSpec(fsdp=4)]
    made, left = within(None, "cpu:4", specs, minutes=0.0)
    assert (len(made), left, tried) == (1, 2, specs[:1])
    made, left = within(None, "cpu:4", specs, minutes=None)
    assert (len(made), left) == (3, 0)


def test_likeliest_meshes_come_first():
    found = candidates(make_run(DENSE), find("cpu:4"))
    assert [spec.tensor for spec in found] == sorted(spec.tensor for spec in found)
    assert (found[0].tensor, found[0].fsdp) == (1, 1)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=", "fsdp=x", "fdsp=2", "fsdp=2,fsdp=2"])
def test_meshes_that_are_none(text):
    with pytest.raises(DyncompError, match="write AXIS=N"):
        mesh_of(text)
    assert mesh_of("fsdp=4,tensor=2") == MeshSpec(fsdp=4, tensor=2)


tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")


@tpu
@pytest.mark.peers
def test_two_meshes_side_by_side(capsys):
    words = [
        "compile",
        "quickstart",
        "--topology",
        "v5e:2x2",
        "--mesh",
        "data=4",
        "--mesh",
        "fsdp=4",
    ]
    assert main([*words, "--json"]) == 0
    data, fsdp = json.loads(capsys.readouterr().out)
    assert data["mesh"]["data"] == fsdp["mesh"]["fsdp"] == 4
    # The state is split in the second; both say what binds.
    assert fsdp["memory"]["arguments"] < data["memory"]["arguments"]
    assert all(found["model"]["apart"] > found["model"]["overlapped"] for found in (data, fsdp))
