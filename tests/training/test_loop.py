"""Runs that are interrupted, go wrong, or start from others."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import Net, Regression, make_run

from dyncomp.core.errors import DyncompError, Preempted
from dyncomp.core.workdir import steps_in
from dyncomp.training import SGD, AdamW, Alternating, InitFrom, Stage
from dyncomp.training import loop as loop_module
from dyncomp.training.checkpoint import read_newest
from dyncomp.training.evaluate import evaluate_workdir
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.trackers import truncate

HERE = Path(__file__).parent


def quiet(run, workdir, **options):
    return train(run, workdir, progress=False, **options)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    """Two work directories with the same metrics file and parameters, bit for bit."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    left, right = read_newest(a), read_newest(b)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].tobytes() == right[path].tobytes(), path


def test_a_run_leaves_what_it_promises(tmp_path):
    run = make_run(eval_every=6)
    summary = quiet(run, tmp_path, config_text="x = 1\n")
    names = ("config.gin", "metrics.jsonl", "timings.jsonl", "environment.json", "summary.json")
    assert all((tmp_path / name).exists() for name in names)
    assert [(r["step"], r["split"]) for r in lines(tmp_path)] == [
        *((3, "train"), (6, "train"), (6, "validation"), (9, "train")),
        *((12, "train"), (12, "validation"), (12, "test")),
    ]
    assert steps_in(tmp_path) == [10, 12] and summary["step"] == 12
    losses = [r["loss"] for r in lines(tmp_path) if r["split"] == "train"]
    assert all(map(math.isfinite, losses))
    assert summary["memory"]["xla_bytes"] > 0
    # FLOPs a second, by the figures of metrics.jsonl: three times the forward pass
    stretches = [json.loads(line) for line in (tmp_path / "timings.jsonl").open()]
    rate = next(r for r in stretches if "flops_needed_per_second" in r)
    each = next(r["flops_needed"] for r in lines(tmp_path) if r["split"] == "train")
    two, three = (r["seconds_per_step"] for r in stretches[:2])  # a save, and the log line
    assert rate["step"] == 3
    flops = rate["flops_needed_per_second"] * (2 * two + three)
    assert flops == pytest.approx(3 * 3 * each * run.batch_size)
    with np.load(tmp_path / "decisions.npz") as found:
        np.testing.assert_array_equal(found["gate/live"], found["inputs"][:, 0] > 0)
    # Independent of the loop: the test error of the restored parameters, in numpy.
    loaded = load(tmp_path, make_run())
    batch = Regression().source("test").batch(np.arange(64))
    p = loaded.variables["params"]
    hidden = np.tanh(batch["inputs"] @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    found = np.mean(
        ((hidden @ p["out"]["kernel"] + p["out"]["bias"])[:, 0] - batch["targets"]) ** 2
    )
    np.testing.assert_allclose(summary["quality"]["mse"], found, rtol=1e-4)
    again = evaluate_workdir(
        tmp_path, loader=lambda text: make_run() if text == "x = 1\n" else None
    )
    assert again["quality"] == summary["quality"]
    assert quiet(make_run(eval_every=6), tmp_path, config_text="x = 1\n") == json.loads(
        (tmp_path / "summary.json").read_text()
    )


def staged():
    """Groups that take turns, then one that is frozen; bfloat16 parameters."""
    adam = AdamW(learning_rate=1e-2)
    turns = Alternating(groups={"^hidden/": adam, "^out/": SGD(learning_rate=1e-3)}, period=2)
    stages = (Stage(steps=5, optimizer=turns), Stage(steps=7, optimizer=adam, trainable="^out/"))
    return make_run(stages=stages, save_every=4, model=Net(param_dtype="bfloat16"), accumulate=2)


@pytest.mark.parametrize("make", [lambda: make_run(eval_every=5, ema=0.9, save_every=4), staged])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, make):
    """Stopped by SIGTERM at several steps; step 5 is where the stages of the second run meet."""
    run = make()
    quiet(run, tmp_path / "whole")
    add = loop_module.Window.add

    def stopping(at):
        def wrapped(self, step, out):
            add(self, step, out)
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)

        return wrapped

    for at in (1, 5, 10):
        monkeypatch.setattr(loop_module.Window, "add", stopping(at))
        with pytest.raises(Preempted, match=f"after step {at} of 12.*run the same command") as stop:
            quiet(run, tmp_path / "cut")
        assert stop.value.exit_code == 75 and "\n" not in str(stop.value)
        assert steps_in(tmp_path / "cut")[-1] == at
    monkeypatch.setattr(loop_module.Window, "add", add)
    quiet(run, tmp_path / "cut")
    same(tmp_path / "whole", tmp_path / "cut")


CHILD = """
import sys
sys.path.insert(0, {here!r})
from tiny import make_run
from dyncomp.core.errors import Preempted
from dyncomp.training.loop import train
try:
    train(make_run(steps=60, save_every=3), sys.argv[1], progress=False, exit_code={code})
except Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(stop.exit_code)
"""


def test_sigterm_from_outside_exits_with_the_code_asked_for(tmp_path):
    code = CHILD.format(here=str(HERE), code=76).replace("train(make", "slow(); train(make")
    slow = """
def slow():
    import time
    from dyncomp.training import loop
    add = loop.Window.add
    loop.Window.add = lambda self, step, out: (add(self, step, out), time.sleep(0.1))
"""
    command = [sys.executable, "-c", slow + code, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while not steps_in(tmp_path) and child.poll() is None:
            pass
        child.send_signal(signal.SIGTERM)
        said = child.communicate()[1].strip().splitlines()
    assert child.returncode == 76 and "run the same command to go on" in said[-1]
    assert 0 < steps_in(tmp_path)[-1] < 60


def test_kill_9_at_random_steps(tmp_path):
    from dyncomp.bench.kills import interrupted_equals_whole

    result = interrupted_equals_whole(tmp_path, kills=2, seed=0)
    assert result.kills == 2 and result.equal, result


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_loss_that_is_no_number_stops_before_anything_bad_is_saved(tmp_path, log_every):
    wild = SGD(learning_rate=1e25, schedule="constant", momentum=0.0)
    run = make_run(optimizer=wild, log_every=log_every, save_every=1, task=Regression(scale=1e5))
    with pytest.raises(
        DyncompError, match=r"(loss|grad_norm) is (nan|inf).* at step \d+; .*lower the"
    ) as e:
        quiet(run, tmp_path)
    assert "\n" not in str(e.value)
    for path, leaf in read_newest(tmp_path).items() if steps_in(tmp_path) else ():
        assert np.all(np.isfinite(leaf)), path


def test_a_full_disk_stops_with_one_line_and_loses_nothing(tmp_path, monkeypatch, capsys):
    from dyncomp.training import integrity

    write = integrity.write_manifest

    def full(folder, leaves, extra):
        if extra["step"] >= 4:
            raise OSError(28, "No space left on device")
        write(folder, leaves, extra)

    monkeypatch.setattr(integrity, "write_manifest", full)
    with pytest.raises(
        DyncompError, match="step 8.*No space left.*step 2 is safe; free space and run"
    ) as e:
        quiet(make_run(), tmp_path / "full")
    assert "\n" not in str(e.value) and steps_in(tmp_path / "full") == [2]
    told = [line for line in capsys.readouterr().err.splitlines() if "training goes on" in line]
    assert len(told) == 2 and "could not save step 4" in told[0]
    monkeypatch.setattr(integrity, "write_manifest", write)
    quiet(make_run(), tmp_path / "full")
    quiet(make_run(), tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "full")


def test_a_store_that_is_away_for_a_while_or_slow_costs_nothing(tmp_path, monkeypatch):
    from dyncomp.training import integrity

    write, failing = integrity.write_manifest, {4, 6, 10}

    def shaky(folder, leaves, extra):
        time.sleep(0.05)
        if extra["step"] in failing:
            raise OSError(5, "Input/output error")
        write(folder, leaves, extra)

    monkeypatch.setattr(integrity, "write_manifest", shaky)
    summary = quiet(make_run(), tmp_path / "shaky")
    assert [note[:30] for note in summary["notes"]] == [
        f"warning: could not save step {step} "[:30] for step in sorted(failing)
    ]
    monkeypatch.setattr(integrity, "write_manifest", write)
    quiet(make_run(), tmp_path / "whole")
    same(tmp_path / "whole", tmp_path / "shaky")


def test_stages_have_their_own_optimizer_and_groups(tmp_path):
    plain = SGD(learning_rate=0.01, schedule="constant")
    stages = (
        Stage(steps=4, optimizer=plain, trainable="^out/"),
        Stage(steps=5, optimizer=AdamW(learning_rate=1e-2), trainable="^hidden/"),
    )
    run = make_run(stages=stages, save_every=4, max_to_keep=9)
    quiet(run, tmp_path)
    assert steps_in(tmp_path) == [4, 8, 9]
    from dyncomp.training.checkpoint import Checkpointer
    from dyncomp.training.engine import Engine

    engine = Engine(run)
    fresh, checkpoints = engine.fresh(), Checkpointer(tmp_path)
    found = {
        s: checkpoints._restore(tmp_path / "checkpoints" / str(s), engine.like(s))[0]
        for s in (4, 9)
    }
    checkpoints.close()
    np.testing.assert_array_equal(
        found[4].params["hidden"]["kernel"], fresh.params["hidden"]["kernel"]
    )
    np.testing.assert_array_equal(
        found[9].params["out"]["kernel"], found[4].params["out"]["kernel"]
    )
    assert np.any(found[9].params["hidden"]["kernel"] != found[4].params["hidden"]["kernel"])


@dataclasses.dataclass(frozen=True)
class Counts:
    """Raises the threshold by its own memory, which it counts up."""

    def init(self, state):
        return jax.numpy.float32(0)

    def __call__(self, state, forward, task, step):
        output, _ = forward(task.source("calibration").batch(np.arange(8)))
        assert output.shape == (8,)
        memory = state.controller + 1
        return state.replace(controls={"threshold": memory}, controller=memory)


def test_a_controller_acts_between_steps_and_its_memory_is_saved(tmp_path):
    """Called after steps 2, 4, 6 and 8; the next stage starts with a memory of its own and no call."""
    adam = AdamW(learning_rate=1e-2)
    stage = Stage(steps=8, optimizer=adam, controller=Counts(), controller_every=2)
    plain = Stage(steps=3, optimizer=SGD(learning_rate=1e-3))
    quiet(make_run(stages=(stage,), save_every=4), tmp_path / "one")
    found = read_newest(tmp_path / "one")
    assert float(found["controller"]) == float(found["controls/threshold"]) == 4.0
    quiet(make_run(stages=(stage, plain), save_every=4), tmp_path / "two")
    found = read_newest(tmp_path / "two")
    assert "controller" not in found and float(found["controls/threshold"]) == 4.0


def test_warm_start_reports_what_it_left(tmp_path, capsys):
    quiet(make_run(steps=2), tmp_path / "a")
    there = read_newest(tmp_path / "a")
    source = InitFrom(path=str(tmp_path / "a"), exclude="bias")
    summary = quiet(
        make_run(steps=1, seed=5, init_from=source, optimizer=SGD(learning_rate=0.0)),
        tmp_path / "b",
    )
    here = read_newest(tmp_path / "b")
    np.testing.assert_array_equal(here["params/out/kernel"], there["params/out/kernel"])
    assert np.any(here["params/out/bias"] != there["params/out/bias"])
    assert "not loaded: out/bias (excluded)" in summary["not_loaded"]
    assert "not used: out/bias" in summary["not_loaded"]
    assert "not loaded: out/bias (excluded)" in capsys.readouterr().err
    with pytest.raises(DyncompError, match="change include, exclude or rename"):
        quiet(make_run(init_from=InitFrom(path=str(tmp_path / "a"), include="^x")), tmp_path / "c")


def test_warm_start_from_a_sibling_with_a_conversion(tmp_path):
    quiet(make_run(steps=2), tmp_path / "a")
    there = read_newest(tmp_path / "a")
    source = InitFrom(sibling="a", convert=lambda found: {"out/kernel": 2 * found["out/kernel"]})
    still = make_run(steps=1, seed=5, init_from=source, optimizer=SGD(learning_rate=0.0))
    summary = quiet(still, tmp_path / "b")
    here = read_newest(tmp_path / "b")
    np.testing.assert_array_equal(here["params/out/kernel"], 2 * there["params/out/kernel"])
    assert "not loaded: out/bias (no out/bias there)" in summary["not_loaded"]
    with pytest.raises(DyncompError, match="either path or sibling"):
        InitFrom()
    with pytest.raises(DyncompError, match="nowhere"):
        quiet(make_run(init_from=InitFrom(sibling="nowhere")), tmp_path / "c")


def test_quick_and_full_runs_do_not_mix(tmp_path):
    summary = quiet(make_run(), tmp_path, quick=True)
    assert summary["step"] == loop_module.QUICK_STEPS
    with pytest.raises(DyncompError, match="holds a --quick run"):
        quiet(make_run(), tmp_path)


def test_a_changed_environment_is_told(tmp_path, capsys):
    quiet(make_run(steps=2), tmp_path)
    record = json.loads((tmp_path / "environment.json").read_text())
    (tmp_path / "environment.json").write_text(json.dumps({**record, "cpu_threads": 99}))
    quiet(make_run(steps=4), tmp_path)
    assert "cpu_threads: 99 then" in capsys.readouterr().err


def test_truncation_drops_later_cut_and_final_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(1, "train"), (2, "validation"), (2, "test"), (3, "train")]
    whole = [json.dumps({"step": s, "split": n}) + "\n" for s, n in rows]
    path.write_text("".join(whole) + '{"step": 1, "spl')
    truncate(path, 2)
    assert path.read_text() == whole[0] + whole[1]


def test_trackers(tmp_path):
    quiet(make_run(steps=3), tmp_path, trackers=("jsonl", "tensorboard"))
    assert list((tmp_path / "tensorboard").glob("events*"))
    with pytest.raises(DyncompError, match="unknown tracker 'x'"):
        quiet(make_run(), tmp_path / "other", trackers=("x",))
