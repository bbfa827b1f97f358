"""The same train step on one and on four devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dyncomp import attention, experts, models, routers, tasks
from dyncomp.core.aux import flatten
from dyncomp.parallel import MeshSpec, make_global_batch, use
from dyncomp.parallel.shardings import shardings_for
from dyncomp.training.run import Run
from dyncomp.training.state import init_variables, new_state
from dyncomp.training.step import train_step

MESHES = {
    "data4": MeshSpec(),
    "fsdp2": MeshSpec(fsdp=2),
    "tensor2": MeshSpec(tensor=2),
    "expert4": MeshSpec(expert=4),
}
UNITS = {
    "dense": functools.partial(experts.SwiGLU, hidden=24),
    "moe": functools.partial(
        experts.MoE, router=functools.partial(routers.TopP, p=0.6), num_experts=4, hidden=12
    ),
}


class Adam:
    """With a large epsilon: the usual 1e-8 divides gradients that are rounding noise by their own size."""

    def build(self, steps):
        return optax.adamw(1e-2, eps=1e-2)


def make_run(unit, **fields):
    mixer = functools.partial(attention.Attention, heads=4, kv_heads=2)
    block = functools.partial(models.Block, mixer=mixer, ffn=UNITS[unit])
    groups = [models.Group([block], 2)]
    model = models.DecoderLM(vocab_size=32, d_model=16, groups=groups, remat="full")
    weights = {"balance": 1e-2, "entropy": 1e-2} if unit == "moe" else {}
    objective = tasks.LMObjective(aux_weights=weights)
    task = tasks.CodeLM(context=16)
    return Run(
        model=model,
        task=task,
        objective=objective,
        optimizer=Adam(),
        steps=3,
        batch_size=8,
        **fields,
    )


# What is compared is mathematics, so the compiler need not work hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def train(unit, mesh_name, accumulate=1):
    """Losses and parameters of three steps on one batch."""
    run = make_run(unit, accumulate=accumulate)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 17)).astype(np.int32)
    mask = np.ones((8, 16), np.float32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "bytes": mask, "mask": mask}
    stage, tx = run.plan()[0], run.optimizer.build(3)
    step = train_step(run, stage, tx)
    init = lambda inputs: init_variables(run.model, inputs, 0)
    make = lambda inputs: new_state(init(inputs), tx, False)
    mesh = MESHES[mesh_name].build() if mesh_name else None
    with use(mesh):
        if mesh is None:
            state, step = jit(make)(batch["inputs"]), jit(step)
        else:
            boxed = jax.eval_shape(
                lambda: init_variables(run.model, jnp.asarray(batch["inputs"]), 0)
            )
            placed, cut = shardings_for(boxed, jax.eval_shape(make, batch["inputs"]), mesh)
            state = jit(make, out_shardings=placed)(batch["inputs"])
            step = jit(step, in_shardings=(placed, cut, None), out_shardings=(placed, None))
        losses, events = [], []
        for _ in range(3):
            state, out = step(state, make_global_batch(batch, mesh), jnp.int32(0))
            losses.append(float(out["loss"]))
            events.append(jax.device_get(out["events"]))
    return np.array(losses), jax.device_get(state.params), events, state


CASES = [(unit, mesh) for unit in UNITS for mesh in MESHES if (unit, mesh) != ("dense", "expert4")]


@pytest.mark.parametrize(("unit", "mesh"), CASES)
def test_four_devices_train_like_one(unit, mesh):
    losses, params, events, _ = train(unit, None)
    others, theirs, counted, state = train(unit, mesh)
    np.testing.assert_allclose(others, losses, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, theirs)
    assert losses[0] > losses[2]
    assert [needed(e) for e in counted] == [needed(e) for e in events]
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params)) == (
        mesh != "data4"
    )


def needed(events):
    """The ledger's counts do not depend on the devices."""
    return {path: int(np.sum(count.needed)) for path, count in flatten(events).items()}


def test_accumulation_agrees_under_a_mesh():
    losses, params, _, _ = train("dense", None)
    others, theirs, _, _ = train("dense", "fsdp2", 2)
    np.testing.assert_allclose(others, losses, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, theirs)
