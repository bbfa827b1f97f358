"""Losses that training should not go on from: found, told, rolled back from; profiles of steps."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import Regression, make_run

from dyncomp.core.errors import DyncompError
from dyncomp.tasks.base import ArraySource
from dyncomp.tasks.loader import Loader
from dyncomp.training.checkpoint import read_newest
from dyncomp.training.guard import ENOUGH, Guard, SpikeError
from dyncomp.training.loop import train
from dyncomp.training.profiling import Profile
from dyncomp.training.trackers import read_records

POISON, STEPS, SAVE = 17, 12, 2


@dataclasses.dataclass(frozen=True)
class Poisoned(Regression):
    """One training example has no finite target."""

    def source(self, split):
        found = super().source(split)
        if split != "train":
            return found
        arrays = found.batch(np.arange(len(found)))
        targets = arrays["targets"].copy()
        targets[POISON] = np.inf
        return ArraySource({"inputs": arrays["inputs"], "targets": targets})


def poisoned(**fields):
    return make_run(task=Poisoned(), steps=STEPS, save_every=SAVE, log_every=1, **fields)


def batches_seen(run):
    """The batch each step is trained on, and how many were passed over: the rule, one step at a time."""
    loader = Loader(run.task.source("train"), seed=run.seed, batch_size=run.batch_size)
    seen, ahead = [], 0
    while len(seen) < STEPS:
        step = len(seen)
        if POISON in loader.indices(step + ahead):
            saved = step // SAVE * SAVE
            seen, ahead = seen[:saved], ahead + step + 1 - saved
        else:
            seen.append(step + ahead)
    return seen, ahead


def test_bad_batches_are_passed_over(tmp_path, monkeypatch):
    run = poisoned(rollbacks=9)
    seen, ahead = batches_seen(run)
    assert ahead > 0
    summary = train(run, tmp_path / "rolled", progress=False)
    assert summary["passed_over"] == ahead
    assert any("back to step" in note for note in summary["notes"])
    # The same batches, given one by one to a run that knows nothing of it.
    indices = Loader.indices
    monkeypatch.setattr(Loader, "indices", lambda self, step: indices(self, seen[step]))
    train(poisoned(), tmp_path / "told", progress=False)
    ours, told = (read_newest(tmp_path / name) for name in ("rolled", "told"))
    assert all(np.array_equal(ours[path], told[path]) for path in told)
    steps = [
        [r["step"] for r in read_records(tmp_path / n / "metrics.jsonl") if r["split"] == "train"]
        for n in ("rolled", "told")
    ]
    assert steps[0] == steps[1] == list(range(1, STEPS + 1))


def test_no_rollback_is_left(tmp_path):
    run = poisoned(rollbacks=1)
    pairs = batches_seen(run)[1]
    assert pairs > SAVE, "the poison must come twice for this test"
    with pytest.raises(
        DyncompError, match=r"at step \d+ after 1 rollbacks; the last good checkpoint"
    ):
        train(run, tmp_path, progress=False)


def test_a_spike_is_told_once_there_is_a_median():
    guard = Guard(3.0)
    guard.look((step, 100.0 if step == 2 else 1.0) for step in range(1, ENOUGH + 1))  # too early
    guard.look([(ENOUGH + 1, 2.9)])
    with pytest.raises(SpikeError, match=rf"loss is 3.1 at step {ENOUGH + 2}, 3.1 times") as told:
        guard.look([(ENOUGH + 2, 3.1), (ENOUGH + 3, 1.0)])
    assert told.value.step == ENOUGH + 2
    assert len(guard.recent) == ENOUGH + 1
    Guard(None, [1.0] * ENOUGH).look([(1, 1e9)])


def test_options_are_checked():
    for bad in ({"rollbacks": -1}, {"spike": 1.0}):
        with pytest.raises(DyncompError, match="use rollbacks >= 0 and spike > 1"):
            make_run(**bad)


def test_a_profile_of_some_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profile = Profile("steps=3..4", tmp_path)
    at = {}
    for step in range(1, 7):
        profile.before(step)
        profile.after(step, jax.numpy.zeros(1))
        at[step] = len(calls)
    assert calls == [str(tmp_path), "stop"]
    assert at == {1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2}
    for text in ("3..4", "steps=0..4", "steps=5..4", "steps=a..b"):
        with pytest.raises(DyncompError, match=r"write steps=10\.\.15"):
            Profile(text, tmp_path)
