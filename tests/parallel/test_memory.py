"""Our count of a train step's memory: parts by hand; XLA's lists of allocations; what is too large is not compiled."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dyncomp import attention, experts, models, routers, tasks
from dyncomp.core.dtypes import DTypes
from dyncomp.parallel import MeshSpec, topology
from dyncomp.parallel.aot import Ask, compile_job, compile_run, held_of, prepare
from dyncomp.parallel.early import memory_of
from dyncomp.parallel.memory import predict_memory
from dyncomp.parallel.residuals import stacked
from dyncomp.training.optimizers import AdamW
from dyncomp.training.run import Run

LAYERS, WIDTH, HIDDEN, WORDS, BATCH, LENGTH = 3, 64, 96, 128, 8, 32


def make_run(unit=None, remat="full", **fields) -> Run:
    unit = unit or functools.partial(experts.SwiGLU, hidden=HIDDEN)
    mixer = functools.partial(attention.Attention, heads=4, kv_heads=2)
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=unit)], LAYERS)]
    model = models.DecoderLM(
        vocab_size=WORDS,
        d_model=WIDTH,
        groups=groups,
        remat=remat,
        dtypes=DTypes(compute="bfloat16"),
    )
    task, optimizer = tasks.CodeLM(context=LENGTH), AdamW(learning_rate=1e-3)
    return Run(
        model=model, task=task, optimizer=optimizer, steps=1, **{"batch_size": BATCH, **fields}
    )


def count(run: Run, **mesh):
    job = prepare(run, Ask("cpu:4", MeshSpec(**mesh)))
    return predict_memory(run.model, job.made, job.mesh, job.rules, held_of(job))


def test_the_parts_by_hand():
    """Split over four: two sequences a device, a quarter of every parameter."""
    found = count(make_run(), fsdp=4)
    layer = 12 * 16 * WIDTH + 3 * WIDTH * HIDDEN + 2 * WIDTH
    total = LAYERS * layer + 2 * WORDS * WIDTH + WIDTH
    tokens = BATCH // 4 * LENGTH
    assert found.gradients == 4 * total // 4
    assert found.copies == 2 * LAYERS * layer // 4
    assert found.kept == LAYERS * tokens * WIDTH * 2  # what enters each layer, bfloat16
    assert found.logits == tokens * WORDS * (4 + 2) + WORDS * WIDTH * 2
    assert found.state == pytest.approx(3 * 4 * total / 4 + 4 * 4 * tokens, rel=0.01)
    table = BATCH // 4 * 4 * LENGTH**2
    assert found.layer >= table * (4 + 2 + 4) + 6 * tokens * HIDDEN * 2
    assert found.peak == found.state + found.copies + found.kept + max(
        found.logits, found.gradients + found.layer
    )


def test_what_is_kept_follows_the_policy():
    kept = {
        policy: count(make_run(remat=policy), data=4).kept for policy in ("full", "dots", "none")
    }
    tokens = BATCH // 4 * LENGTH
    # the input, queries of 4 heads, keys and values of 2, what attention gives out, gate and up
    assert kept["dots"] == LAYERS * tokens * 2 * (3 * WIDTH + 2 * 32 + 2 * HIDDEN)
    assert kept["full"] < kept["dots"] < kept["none"]


def test_rows_of_experts_and_frozen_parameters_count():
    router = functools.partial(routers.TopK, k=2)
    moe = functools.partial(experts.MoE, router=router, num_experts=4, hidden=HIDDEN)
    dense, routed = count(make_run(), fsdp=4), count(make_run(moe), fsdp=4)
    assert routed.layer > dense.layer and routed.state > dense.state
    frozen = count(make_run(trainable="final_norm"), fsdp=4)
    assert frozen.gradients == 4 * WIDTH // 4 and frozen.kept == 0
    accumulated = count(make_run(accumulate=2), fsdp=4)
    assert accumulated.gradients == 2 * dense.gradients and accumulated.kept == dense.kept // 2


def test_models_it_does_not_know_have_no_count():
    pattern = functools.partial(attention.AShape, window=8, tile=4)
    mixer = functools.partial(attention.Attention, heads=4, pattern=pattern)
    unit = functools.partial(experts.SwiGLU, hidden=HIDDEN)
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=unit)], 1)]
    run = make_run()
    assert count(run.replace(model=run.model.clone(groups=groups))) is None
    assert count(run.replace(model=run.model.clone(layers="unroll"))) is None


@pytest.mark.parametrize(("limit", "said"), [(1000, "the state alone takes"), (0, "our own count")])
def test_what_is_too_large_is_not_compiled(monkeypatch, limit, said):
    run = make_run()
    job = prepare(run, Ask("cpu:4", MeshSpec(fsdp=4)))
    limit = limit or job.state_bytes + 1
    where = topology.Topology("cpu:4", job.where.devices, limit)
    monkeypatch.setattr("dyncomp.parallel.aot._compiled", lambda job: pytest.fail("compiled"))
    report = compile_job(job.__class__(**{**vars(job), "where": where}))
    assert report.fits is False and said in report.verdict() and report.memory is None


def test_a_report_has_both_counts():
    report = compile_run(make_run(), "cpu:4", MeshSpec(fsdp=4))
    assert report.predicted["peak"] > report.state_bytes > 0
    rows = dict(report._rows())
    assert {"peak a device", "peak a device (ours)", "state a device (ours)"} <= set(rows)


def test_xlas_list_of_allocations():
    """Colours are memory on the chip; what is live out and no parameter is a new output."""
    found = memory_of("""\
BufferAssignment:
allocation 0: size 512, thread-local:
allocation 1: size 4000, parameter 0, shape |f32[1000]| at ShapeIndex {}, maybe-live-out:
 value: <1 p> (size=4000,offset=0): f32[1000]
allocation 2: size 64, parameter 1, shape |s32[16]| at ShapeIndex {}:
allocation 3: size 8, maybe-live-out:
allocation 4: size 12, constant:
allocation 5: size 3000, preallocated-temp:
allocation 6: size 9999, color 1, preallocated-temp:
""")
    assert (found.arguments, found.outputs, found.aliased) == (4064, 4008, 4000)
    assert (found.temporaries, found.peak) == (3012, 4064 + 8 + 3012)


def test_what_is_named_twice_is_kept_once():
    """Three products read one array; a form for CPUs keeps another one, which other platforms leave empty."""
    cpu = lambda x, w: (x.reshape(-1, 4) @ w).reshape(x.shape)
    product = lambda x, w: jax.lax.platform_dependent(x, w, cpu=cpu, default=jnp.matmul)

    def layer(x, w):
        y = jnp.tanh(x)
        return x + product(y, w) * product(y.reshape(2, 3, 4), w), None

    def residuals(x, ws):
        _, pull = jax.vjp(lambda ws: jax.lax.scan(layer, x, ws)[0], ws)
        return [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")]

    traced = jax.make_jaxpr(residuals)(jnp.ones((2, 3, 4)), jnp.ones((5, 4, 4)))
    found = [[aval.shape for aval in same] for same in stacked(traced.jaxpr)]
    # y (read by tanh's slope and both products) and that slope; the weight, read twice; both products
    assert sorted(shapes[0] for shapes in found) == [*[(5, 2, 3, 4)] * 4, (5, 4, 4)]
    assert all(len(set(shapes)) == 1 for shapes in found)
    assert sum(map(len, found)) >= 7  # jax 0.11 itself names y less often
