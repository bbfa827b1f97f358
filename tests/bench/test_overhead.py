"""The hand-written peer computes what our model computes, and both sides take the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.bench import overhead, plain
from dyncomp.models import apply
from dyncomp.tasks.loader import Loader
from dyncomp.training.engine import Engine

SCALE = overhead.Scale(6, 2, 4, 16, 16, 2, 32, 4, 50_000)
CASES = {
    "dense": (overhead.dense_ffn(SCALE), lambda scan: plain.Shape(scan)),
    "top_p": (overhead.top_p_ffn(SCALE), lambda scan: overhead.top_p_shape(SCALE, scan=scan)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))


@pytest.mark.parametrize("name, layers", [("dense", "scan"), ("top_p", "unroll")])
def test_loss_and_gradients_agree(name, layers):
    ffn, shape = CASES[name][0], CASES[name][1](layers == "scan")
    run = overhead.make_run(SCALE, ffn, 4, layers)
    batch = Loader(run.task.source("train"), seed=0, batch_size=4).batch(0)
    batch = jax.tree.map(jnp.asarray, batch)
    # larger weights than at the start, so that attention, norms and routers are far from trivial
    state = Engine(run).fresh()
    params, controls = jax.tree.map(lambda leaf: 3 * leaf, state.params), state.controls

    def ours(params):
        variables = {"params": params, "controls": controls}
        output, aux = apply(run.model, variables, batch["inputs"], train=True)
        return run.objective(output, aux, batch, 0)[0]

    loss, grads = jax.jit(jax.value_and_grad(ours))(params)
    theirs = jax.jit(jax.value_and_grad(lambda p: plain.loss_fn(p, batch, shape)))
    peer_loss, peer_grads = theirs(plain.from_library(params))
    assert abs(loss - peer_loss) <= 1e-5
    grads = plain.from_library(grads)
    norm = lambda leaf: float(jnp.linalg.norm(leaf.ravel()))
    apart = jax.tree.map(lambda a, b: norm(a - b) / norm(b), grads, peer_grads)
    assert max(jax.tree.leaves(apart)) <= 3e-5, apart  # other machine code, other roundings
    assert min(jax.tree.leaves(jax.tree.map(norm, peer_grads))) > 1e-4


def test_both_loops_take_the_same_steps():
    """Losses after two steps of AdamW agree, so batches, optimizer and order are the same."""
    ffn, shape = CASES["dense"][0], CASES["dense"][1](True)
    run = overhead.make_run(SCALE, ffn, 4, "scan")
    loop = overhead.PlainLoop(run, shape, 4)
    loop(0, 2)
    loop(2, 2)
    engine, losses = Engine(run), []
    loader = Loader(run.task.source("train"), seed=0, batch_size=4)
    compiled, _ = engine.compile(0, loader.batch(0))
    state = engine.fresh()
    for step in range(4):
        state, out = compiled(state, loader.batch(step), np.int32(0))
        losses.append(float(out["loss"]))
    np.testing.assert_allclose(loop.losses, [np.mean(losses[:2]), np.mean(losses[2:])], rtol=1e-5)
    moved = np.abs(np.asarray(loop.params["head"] - Engine(run).fresh().params["head"]))
    assert moved.max() > 1e-4


def test_the_peer_takes_its_turn_at_every_log_line():
    """The peer sees every batch once, in order; the first stretch of both sides warms up."""
    seen = []
    turns = overhead.Turns(lambda start, count: seen.append((start, count)), 2)
    for step in (2, 4, 6):
        turns.write(step, "train", {})
    assert seen == [(0, 2), (2, 2), (4, 2)]
    pairs = turns.pairs
    assert [len(s) for s in (pairs.ours, pairs.peer, pairs.ours_cpu, pairs.peer_cpu)] == [2] * 4
