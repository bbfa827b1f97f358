"""Reading compiled programs; compiling runs for simulated CPUs and, as peers, for TPUs that are not here."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from dyncomp import attention, experts, models, routers, tasks
from dyncomp.core.errors import DyncompError
from dyncomp.parallel import MeshSpec, hlo
from dyncomp.parallel.aot import compile_run
from dyncomp.parallel.counts import executed_at_most
from dyncomp.parallel.topology import find
from dyncomp.training.optimizers import AdamW
from dyncomp.training.run import Run

TEXT = """\
HloModule m, entry_computation_layout={()->f32[]}

%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p.1), index=1
  %ag = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  %my_kernel.7 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[8]) tuple(%p.1)
}

%piece (q: f32[8]) -> bf16[4,8] {
  ROOT %ag.2 = bf16[4,8]{1,0} all-gather(%q), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]) while(%a), condition=%cond, body=%body
  %f = bf16[4,8]{1,0} fusion(%a), kind=kCustom, calls=%piece
  %ars = ((f32[8], f32[2,2]), (f32[8], f32[2,2])) all-reduce-start(%a, %a), channel_id=9, replica_groups={{0,1},{2,3}}
  %ard = (f32[8], f32[2,2]) all-reduce-done(%ars)
  ROOT %r = f32[] custom-call(%a), custom_call_target="Sharding"
}
"""


def test_collectives_are_counted_by_trips_and_channels():
    found = hlo.collectives(TEXT)
    assert found == {
        "all-gather": hlo.Traffic(
            sites=1, runs=5, bytes=5 * 4 * 8 * 2, sent=5 * 4 * 8 * 2 * 3 // 4
        ),
        "all-reduce": hlo.Traffic(sites=1, runs=1, bytes=(8 + 4) * 4, sent=2 * (8 + 4) * 4 // 2),
    }
    assert hlo.kernels(TEXT) == {"my_kernel": 1}


def test_programs_are_compared_without_names_and_notes():
    one = """
ENTRY %main.3 (x.1: f32[2]) -> f32[2] {
  %x.1 = f32[2]{0} parameter(0), sharding={replicated}, metadata={op_name="state"}
  ROOT %add.5 = f32[2]{0} add(%x.1, %x.1), metadata={op_name="jit(step)/add"}
}
"""
    other = one.replace("x.1", "p").replace("add.5", "sum").replace(", sharding={replicated}", "")
    found = ["% = f32[2]{0} parameter(0)", "ROOT % = f32[2]{0} add(%, %)"]
    assert hlo.anonymous(one) == hlo.anonymous(other) == found
    assert hlo.anonymous(one.replace(" add(", " multiply(")) != found


def test_what_a_shard_map_holds_shares_channel_1_and_counts_one_by_one():
    start = "((bf16[8,4]{1,0:T(8,128)(2,1)}), bf16[8,4]{1,0:T(8,128)S(1)}, u32[], u32[]) all-to-all-start(%a)"
    text = f"""\
ENTRY %main (a: f32[8]) -> f32[] {{
  %one = {start}, channel_id=1, replica_groups={{{{0,1}}}}
  %two = {start}, channel_id=1, replica_groups={{{{0,1}}}}
  %done = bf16[8,4] all-to-all-done(%one)
}}
"""
    assert hlo.collectives(text) == {
        "all-to-all": hlo.Traffic(sites=2, runs=2, bytes=2 * 8 * 4 * 2, sent=8 * 4 * 2)
    }


def test_a_real_program_has_the_collectives_it_must_have():
    """A matrix product whose inner dimension is split over 4 devices needs one sum a step."""
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = MeshSpec(data=1, tensor=4).build()
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))

    def loop(x, w):
        return jax.lax.fori_loop(0, 6, lambda _, x: jnp.tanh(x @ w), x)

    split = jax.jit(
        loop, in_shardings=(place(None, "tensor"), place("tensor")), out_shardings=place()
    )
    shapes = jax.ShapeDtypeStruct((16, 8), "float32"), jax.ShapeDtypeStruct((8, 8), "float32")
    found = hlo.collectives(split.lower(*shapes).compile().as_text())
    size = 6 * 16 * 8 * 4
    assert found["all-reduce"] == hlo.Traffic(sites=1, runs=6, bytes=size, sent=size * 2 * 3 // 4)


def make_run(ffn, layers=3, **fields):
    mixer = functools.partial(attention.Attention, heads=4, kv_heads=2)
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=ffn)], layers)]
    model = models.DecoderLM(vocab_size=64, d_model=64, groups=groups, remat="full")
    fields = {"batch_size": 8, **fields}
    optimizer = AdamW(learning_rate=1e-3)
    return Run(model=model, task=tasks.CodeLM(context=32), optimizer=optimizer, steps=2, **fields)


DENSE = functools.partial(experts.SwiGLU, hidden=96)
ROUTER = functools.partial(routers.TopP, p=0.4, max_p=0.4)
MOE = functools.partial(experts.MoE, router=ROUTER, num_experts=4, hidden=48)


def test_report_for_simulated_devices():
    report = compile_run(make_run(DENSE), "cpu:4", MeshSpec(fsdp=2))
    assert (report.devices, report.mesh["data"], report.mesh["fsdp"]) == (4, 2, 2)
    # embed and head 2 x 64 x 64; a layer: q, k, v, out (4+2+2+4) x 16 x 64, three of 64 x 96, two norms; final norm
    assert report.parameters == 2 * 64 * 64 + 3 * (12 * 16 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    state = 3 * 4 * report.parameters / 2  # parameters and two moments, float32, halved by fsdp
    batch = 4 * 4 * 2 * 32
    assert report.memory.arguments == pytest.approx(state + batch, rel=0.02)
    assert report.fits is None and report.memory.aliased <= report.memory.arguments
    # per token 2 x weights of the matrices, pairs over the full square, three passes
    weights = 64 * 64 + 3 * (12 * 16 * 64 + 3 * 64 * 96)
    forward = 8 * 32 * 2 * weights + 3 * 8 * 32 * 32 * 4 * 64
    assert report.ledger_flops == 3 * forward // 4
    assert {"all-gather", "all-reduce"} & set(report.collectives)
    told = json.loads(report.to_json())
    assert told["verdict"] == report.verdict() and told["memory"]["peak"] > 0


def test_expert_rows_are_bounded_by_the_slots_of_the_plan():
    model = make_run(MOE).model
    inputs = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), inputs))
    counts = executed_at_most(model, variables, inputs)
    rows = 3 * 8 * 32  # layers x tokens
    assert counts["group_0/block_0/ffn/experts/rows"] == 2 * rows  # floor(0.4 * 4) + 1 slots
    assert counts["group_0/block_0/ffn/router/rows"] == rows
    assert counts["head/tokens"] == 8 * 32


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5x:2x2", "unknown topology 'v5x:2x2'; known are such as"),
        ("cpu:0", "no devices"),
        ("cpu:99", "simulates 4"),
    ],
)
def test_unknown_topologies_are_refused_in_one_line(topology, said):
    with pytest.raises(DyncompError, match=said) as caught:
        find(topology)
    assert "\n" not in str(caught.value)


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(DyncompError, match=r'pip install "dyncomp\[tpu\]"'):
        find("v5e:2x2")


def test_a_batch_that_cannot_be_split_is_refused_before_compiling():
    with pytest.raises(DyncompError, match="batch size 6 is not a multiple of 4"):
        compile_run(make_run(DENSE, batch_size=6), "cpu:4")
    with pytest.raises(DyncompError, match="batch size 2 is not"):
        compile_run(make_run(DENSE, accumulate=4), "cpu:4")


tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")


@tpu
def test_an_axis_may_be_part_of_a_physical_one():
    """8 is no product of a subset of 4, 4 and 4."""
    mesh = MeshSpec(data=1, fsdp=8, expert=8).build(find("v5p:4x4x4").devices)
    assert {n: size for n, size in mesh.shape.items() if size > 1} == {"fsdp": 8, "expert": 8}
    assert len(set(mesh.devices.flat)) == 64


@tpu
@pytest.mark.peers
@pytest.mark.parametrize("spec", [MeshSpec(), MeshSpec(fsdp=2, tensor=2)])
def test_mixture_of_experts_compiles_for_four_tpu_chips(spec):
    """Kernels in a custom gradient, chosen by platform, under shard_map, remat and scan."""
    report = compile_run(make_run(MOE), "v5e:2x2", spec)
    # gate, up and down going forward; gate and up again (remat) and, unless XLA drops it, down; three row gradients
    calls = report.kernels["ragged-dot-none"]
    assert 8 <= calls <= 9
    assert report.fits and report.memory.peak < 2**30
    assert "all-reduce" in report.collectives


@tpu
@pytest.mark.peers
def test_dense_flops_on_a_tpu_are_those_of_the_ledger():
    """One unrolled layer, nothing recomputed: XLA counts what the ledger prices, plus norms and the optimizer."""
    run = make_run(DENSE, layers=1)
    run = run.replace(model=run.model.clone(layers="unroll", remat="none"))
    report = compile_run(run, "v5e:2x2")
    assert 1.0 <= report.xla_flops / report.ledger_flops < 1.25


@tpu
@pytest.mark.peers
def test_a_model_that_is_too_large_is_told_so():
    wide = functools.partial(experts.SwiGLU, hidden=1 << 20)
    report = compile_run(make_run(wide, layers=24), "v5e:2x2")
    assert report.fits is False and "does not fit" in report.verdict()
