"""Exits trained from a run in three stages: what moves when, what the controllers do, and interruptions."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp import config, experts, models
from dyncomp.attention import Attention
from dyncomp.core.errors import DyncompError, Preempted
from dyncomp.core.workdir import steps_in
from dyncomp.exits import (
    ConfidenceRule,
    HeadWarmUp,
    JointExitObjective,
    MultiExitObjective,
    PositiveWeights,
)
from dyncomp.exits.controllers import HeadPatience
from dyncomp.tasks import ClassificationObjective, Digits
from dyncomp.training import AdamW, Alternating, Run, Stage
from dyncomp.training import loop as loop_module
from dyncomp.training.checkpoint import read_newest
from dyncomp.training.controller import Controller
from dyncomp.training.engine import Engine
from dyncomp.training.loop import train

STARTS = {"backbone": 0, "heads": 4, "joint": 12}
STEPS, EVERY, PERIOD = 20, 4, 2
LAM = 0.3


def model():
    block = functools.partial(
        models.Block,
        mixer=functools.partial(Attention, heads=2, rope_theta=None, causal=False),
        ffn=functools.partial(experts.MLP, hidden=16),
        norm="layer",
    )
    groups = (models.Group((block,), 3),)
    net = functools.partial(models.VisionTransformer, classes=10, patch=4, d_model=8, groups=groups)
    return models.ExitingClassifier(backbone=net, rule=ConfidenceRule(threshold=0.3))


def make_run(**fields):
    adam = AdamW(learning_rate=0.05, weight_decay=0.0)
    joint = JointExitObjective(
        lam=LAM, period=PERIOD, steps_per_epoch=EVERY, first_step=STARTS["joint"]
    )
    turns = {"^bank/gates/": adam, "^bank/heads/": adam}
    stages = (
        Stage(
            steps=4,
            optimizer=adam,
            trainable="^net/",
            objective=ClassificationObjective(answer="final"),
        ),
        Stage(
            steps=8,
            optimizer=adam,
            trainable="^bank/heads/",
            objective=MultiExitObjective(),
            controller=HeadWarmUp(until=STARTS["joint"], patience=1, batch_size=50),
            controller_every=EVERY,
        ),
        Stage(
            steps=8,
            optimizer=Alternating(groups=turns, period=PERIOD, cycle=EVERY),
            trainable="^bank/",
            objective=joint,
            controller=PositiveWeights(objective=joint, batch_size=50),
            controller_every=EVERY,
        ),
    )
    defaults = {"model": model(), "task": Digits(), "batch_size": 16, "capture": False}
    more = {"save_every": 1, "max_to_keep": 30, "final_eval_batches": 2, "log_every": 5}
    return Run(**{**defaults, **more, "stages": stages, **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run and the arrays of every step, by path."""
    folder = tmp_path_factory.mktemp("run")
    summary = train(make_run(), folder, progress=False)
    assert steps_in(folder) == list(range(1, STEPS + 1))
    states = {}
    for step in range(1, STEPS + 1):
        alone = tmp_path_factory.mktemp(f"step{step}") / "checkpoints"
        alone.mkdir()
        (alone / str(step)).symlink_to(folder / "checkpoints" / str(step))
        states[step] = read_newest(alone.parent)
    return summary, states


def moved(states, step):
    """Parts of the model that step ``step`` changed."""
    before, after = states[step - 1], states[step]
    changed = [
        path.removeprefix("params/")
        for path in after
        if path.startswith("params/") and np.any(before[path] != after[path])
    ]
    return {"net" if path.startswith("net/") else path.split("/")[1] for path in changed}


def test_every_stage_moves_its_own_part_only(trained):
    _, states = trained
    # The final norm and head belong to the backbone; gates go first in each epoch of the joint stage.
    wanted = {step: {"net"} for step in range(2, 5)} | {step: {"heads"} for step in range(5, 13)}
    for step in range(13, STEPS + 1):
        turn = (step - 13) % EVERY // PERIOD
        wanted[step] = {"gates"} if turn == 0 else {"heads"}
    # At 12 the heads go back to their best, which may be where they were before the step.
    assert {step: moved(states, step) for step in wanted if step != 12} == {
        step: parts for step, parts in wanted.items() if step != 12
    }


def logits_of(state, split="validation"):
    """Logits [x n c], gate logits [y n] and labels under saved parameters, on the whole split at once."""
    tree = {}
    for path, leaf in state.items():
        head, *rest = path.split("/")
        if head in ("params", "controls"):
            node = tree.setdefault(head, {})
            for name in rest[:-1]:
                node = node.setdefault(name, {})
            node[rest[-1]] = leaf
    source = Digits().source(split)
    batch = source.batch(np.arange(len(source)))
    output, _ = model().apply(tree, batch["inputs"])
    return np.asarray(output["logits"], np.float64), batch["targets"]


def nll(logits, labels):
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -log_p[:, np.arange(len(labels)), labels]


def test_positive_weights_are_those_of_the_validation_split(trained):
    _, states = trained
    for step in (16, 20):
        state = states[step]
        losses = nll(*logits_of(state))
        prices = [price.flops for price in model().cost((1, 8, 8, 1)).values()]
        costs = np.cumsum(prices) / np.sum(prices)
        best = (losses + LAM * costs[:, None]).argmin(0)
        n = len(best)
        counts = np.maximum([(best == exit_).sum() for exit_ in range(2)], 0.1)
        wanted = np.minimum((n - counts) / counts, 5.0)
        np.testing.assert_allclose(state["controls/pos_weight"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(states[15]["controls/pos_weight"], np.ones(2))


def test_warm_up_ends_with_the_best_heads_seen(trained):
    """Each head's saved loss is that of its saved weights, and the stage hands those weights on."""
    _, states = trained
    at_8 = nll(*logits_of(states[8]))[:-1].mean(1)
    np.testing.assert_allclose(states[8]["controller/best_loss"], at_8, rtol=1e-4)
    at_12 = nll(*logits_of(states[12]))[:-1].mean(1)
    assert (at_12 <= at_8 * (1 + 1e-6)).all()


def test_frozen_heads_go_back_to_their_best():
    """Validation losses are made up: head 0 gets worse at once, head 1 improves."""
    run = make_run()
    engine = Engine(run)
    state = engine.enter(1, engine.fresh())
    controller = HeadWarmUp(until=100, patience=1, batch_size=50)
    assert isinstance(controller, Controller)
    labels = run.task.source("validation").batch(np.arange(50))["targets"]

    def forward_with(margins):
        """Logits whose cross-entropy falls with the margin of the right class."""

        def forward(batch):
            right = jax.nn.one_hot(batch["targets"], 10)
            return {"logits": jnp.stack([m * right for m in (*margins, 0.0)])}, None

        return forward

    def heads(value):
        bank = state.params["bank"]
        filled = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), bank["heads"])
        return {**state.params, "bank": {**bank, "heads": filled}}

    for step, (value, margins) in enumerate([(1.0, (2, 2)), (2.0, (1, 3)), (3.0, (9, 4))]):
        state = state.replace(params=heads(value))
        state = controller(state, forward_with(margins), run.task, step)
        state = engine.settle(1, state)
    kernel = np.asarray(state.params["bank"]["heads"]["logits_kernel"])
    # Head 0 was frozen at the second validation, with its weights of the first.
    assert (kernel[0] == 1.0).all() and (kernel[1] == 3.0).all()
    loss = np.log(np.exp([2.0, 4.0]) + 9) - [2.0, 4.0]
    np.testing.assert_allclose(state.controller["best_loss"], loss, rtol=1e-5)
    np.testing.assert_array_equal(state.controller["waited"], [1, 0])
    assert len(labels) == 50


def test_the_last_validation_restores_every_head():
    patience = HeadPatience(1, patience=3)
    heads = lambda v: {"kernel": np.full((1, 2), v, np.float32)}
    live = [patience.update(np.asarray([loss]), heads(i)) for i, loss in enumerate([2.0, 1.0, 1.5])]
    assert float(live[-1]["kernel"][0, 0]) == 2.0  # not frozen yet, so it goes on from where it is
    assert float(patience.restore()["kernel"][0, 0]) == 1.0


def test_evaluation_counts_segments_and_sweeps_thresholds(trained):
    summary, _ = trained
    events = summary["compute"]["events_per_element"]
    assert list(events) == ["segment_0", "segment_1", "segment_2"]
    assert events["segment_0"] == 1.0 >= events["segment_1"] >= events["segment_2"]
    prices = [price.flops for price in model().cost((1, 8, 8, 1)).values()]
    needed = sum(events[f"segment_{i}"] * price for i, price in enumerate(prices))
    assert summary["compute"]["flops_needed"] == pytest.approx(needed)
    assert summary["compute"]["flops_executed"] == sum(prices)
    assert set(summary["quality"]) == {"accuracy", "accuracy_final", "nll"}


@pytest.mark.parametrize("at", [8, 10, 14])
def test_an_interrupted_run_ends_with_the_same_bits(trained, tmp_path, monkeypatch, at):
    """At 8 the warm-up has just validated; 10 and 14 are between the controllers' calls."""
    _, states = trained
    add = loop_module.Window.add

    def stopping(self, step, out):
        add(self, step, out)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop_module.Window, "add", stopping)
    with pytest.raises(Preempted, match=f"after step {at} of {STEPS}"):
        train(make_run(save_every=100), tmp_path, progress=False)
    monkeypatch.setattr(loop_module.Window, "add", add)
    train(make_run(save_every=100), tmp_path, progress=False)
    again = read_newest(tmp_path)
    assert set(again) == set(states[STEPS])
    for path, leaf in again.items():
        np.testing.assert_array_equal(leaf, states[STEPS][path], err_msg=path)


def test_controllers_refuse_nonsense():
    with pytest.raises(DyncompError, match="until=0"):
        HeadWarmUp(until=0)
    with pytest.raises(DyncompError, match="patience=0"):
        HeadPatience(2, patience=0)


@pytest.mark.parametrize("name", ["jei_dnn", "jei_dnn_paper"])
def test_shipped_configs_agree_with_themselves(name):
    """Objective, optimizer and controllers each name steps; nothing else ties them together."""
    loaded = config.load(name)
    run = loaded.runs["gates"] if name == "jei_dnn" else loaded
    _, heads, joint = run.plan()
    start = run.total_steps - joint.steps
    assert heads.controller.until == joint.objective.first_step == start
    assert joint.controller.objective == joint.objective
    assert joint.optimizer.period == joint.objective.period
    assert joint.optimizer.cycle == joint.objective.steps_per_epoch == joint.controller_every
    # Controllers act at multiples of the global step; the last validation must fall on the stage's end.
    for first, stage in ((run.plan()[0].steps, heads), (start, joint)):
        assert first % stage.controller_every == stage.steps % stage.controller_every == 0
