"""The training loop: resume, step, log, evaluate, save, stop cleanly.

The loop never waits for a step but at log, evaluation and save points. At step s it logs, evaluates, calls the
controller, enters the next stage and saves, in this order, so that whatever a checkpoint of step s stands for is
already in ``metrics.jsonl``. A checkpoint that cannot be written (a full disk) is told and passed over; the third in a
row stops training with one line: what was saved before stays, and the same command goes on from there. With
``Run.rollbacks``, a loss that is no number, or a spike, sends training back to the last checkpoint, and the batches
since are passed over: batch t is then a pure function of (seed, t, how many were passed over), which checkpoints carry.

Several processes run this same loop. What a host decides comes from values that are whole on every device (losses,
what a controller is shown) or from process 0 (`dyncomp.parallel.processes`), which alone writes files and speaks.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp.core.errors import DyncompError, Preempted
from dyncomp.core.ledger import Ledger
from dyncomp.core.workdir import steps_in
from dyncomp.parallel import processes
from dyncomp.parallel.roofline import peak_flops
from dyncomp.tasks.loader import Loader
from dyncomp.training import compile_cache, records
from dyncomp.training.checkpoint import Checkpointer
from dyncomp.training.engine import Engine
from dyncomp.training.evaluate import Evaluator, compute, save_decisions, spent
from dyncomp.training.exit_outputs import save_exit_outputs
from dyncomp.training.guard import Guard, LossError
from dyncomp.training.memory import Measured
from dyncomp.training.preemption import Terminator
from dyncomp.training.profiling import Profile
from dyncomp.training.records import Timings
from dyncomp.training.run import Run
from dyncomp.training.trackers import Tracker, make_trackers
from dyncomp.training.warm_start import warm_start
from dyncomp.training.window import Window

QUICK_STEPS = 4
TRAINED = 3
"""FLOPs of a training step over those of its forward pass: gradients of inputs and of weights take as many each."""


def train(
    run: Run,
    workdir: Path | str,
    *,
    config_text: str = "",
    trackers: Sequence[str] = ("jsonl",),
    progress: bool = True,
    quick: bool = False,
    exit_code: int = 75,
    profile: str = "",
) -> dict[str, Any]:
    """Trains a run, or resumes it where ``workdir`` holds a checkpoint, and evaluates it.

    In a job of several processes (`dyncomp.parallel.processes.join`) each calls this with the same arguments.

    Args:
      run: what to train.
      workdir: one folder that all processes see; gets config.gin, metrics.jsonl, timings.jsonl, environment.json,
        checkpoints/, decisions.npz, summary.json.
      config_text: the resolved config, saved with every checkpoint.
      trackers: of "jsonl" (always on), "tensorboard", "wandb".
      progress: show a progress bar and notes on standard error.
      quick: a few steps of each stage and small evaluations: a smoke run, never evidence.
      exit_code: what `Preempted` carries when SIGTERM stops the run.
      profile: ``steps=10..15`` traces these steps into ``workdir``/profile.

    Returns:
      The content of summary.json.

    Raises:
      Preempted: SIGTERM came; the state is saved.
      DyncompError: bad input, a loss that is not finite, a checkpoint that cannot be written or read.
    """
    run = quicken(run) if quick else run
    workdir = Path(workdir)
    tracer = Profile(profile, workdir / "profile") if profile else None
    workdir.mkdir(parents=True, exist_ok=True)
    compile_cache.enable()
    notes = processes.from_lead(lambda: records.look_at(workdir, config_text, quick))
    finished = lambda: records.finished(workdir, config_text, run.total_steps)
    if (done := processes.from_lead(finished)) is not None:
        return done
    session = Session(run, workdir, config_text, notes, exit_code, tracer)
    with session.engine.context(), Terminator() as terminator:
        try:
            session.restore()
            processes.from_lead(lambda: records.take_over(workdir, config_text, quick))
            session.start(trackers, progress)
            session.steps(terminator)
            return session.finish()
        finally:
            session.close()


def quicken(run: Run) -> Run:
    """The same run with very few steps and small evaluations."""
    stages = [dataclasses.replace(s, steps=min(s.steps, QUICK_STEPS)) for s in run.plan()]
    short: dict[str, Any] = {"optimizer": None, "steps": 0, "stages": tuple(stages)}
    return run.replace(**short, log_every=2, eval_batches=1, final_eval_batches=1)


class Session:
    """One process's part of a run; `restore`, `start`, `steps`, `finish`, `close` in this order."""

    def __init__(
        self,
        run: Run,
        workdir: Path,
        config_text: str,
        notes: list[str],
        exit_code: int,
        tracer: Profile | None = None,
    ):
        self.run, self.workdir, self.notes, self.exit_code = run, workdir, notes, exit_code
        self.lead = processes.lead()
        self.tracer = tracer if self.lead else None
        self.engine = Engine(run)
        self.evaluator = Evaluator(run, self.engine.mesh)
        self.checkpoints = Checkpointer(
            workdir, max_to_keep=run.max_to_keep, config_text=config_text, say=self.say
        )
        self.trackers: list[Tracker] = []
        self.timings: Timings | None = None
        self.bar: records.Bar | None = None
        self.not_loaded: list[str] = []
        self.memory: dict[str, Any] = {}
        self.compile_seconds: list[float] = []
        self.compiled: dict[int, Any] = {}

    def say(self, line: str) -> None:
        """A note for the reader."""
        self.notes.append(line)
        self._print(line)

    def _print(self, line: str) -> None:
        if self.lead:
            print(line, file=sys.stderr)

    def restore(self) -> None:
        """Restores the newest good checkpoint or makes step 0; nothing in the folder changes."""
        for note in self.notes:
            self._print(note)
        self._newest()

    def _newest(self) -> None:
        found = self.checkpoints.restore(self.engine.like)
        if found is None:
            self.state, self.extra = self.engine.fresh(), {}
            if self.run.init_from:
                self.state, report = warm_start(self.state, self.run.init_from, self.workdir)
                self.not_loaded = report.lines()
                for line in self.not_loaded:
                    self.say(line)
        else:
            self.state, self.extra = found
            self.not_loaded = self.extra.get("not_loaded", [])
        self.step = int(self.state.step)
        self.window = Window(self.extra.get("window"))
        self.guard = Guard(self.run.spike, self.extra.get("recent", ()))
        self.passed_over, self.rolled = (
            self.extra.get("passed_over", 0),
            self.extra.get("rolled", 0),
        )

    def start(self, trackers: Sequence[str], progress: bool) -> None:
        """Opens the files and the bar; what lies after the restored step goes."""
        self.kinds = tuple(trackers)
        if self.lead:
            self.checkpoints.drop_after(self.step)
        self._track()
        self.timings = Timings(self.workdir / "timings.jsonl" if self.lead else None, self._peak())
        shown = progress and self.lead
        self.bar = records.Bar(self.workdir.name, self.run.total_steps, self.step, shown)

    def _peak(self) -> float | None:
        """FLOPs a second of all devices of this run, where known."""
        one = peak_flops(jax.devices()[0].device_kind)
        return one and one * (self.engine.mesh.size if self.engine.mesh else 1)

    def _track(self) -> None:
        """Opens the trackers at the present step."""
        for tracker in self.trackers:
            tracker.close()
        self.trackers = make_trackers(self.kinds, self.workdir, self.step) if self.lead else []

    def steps(self, terminator: Terminator) -> None:
        """All steps that are left."""
        run, rows = self.run, self.engine.rows
        source = run.task.source("train")
        loader = Loader(source, seed=run.seed, batch_size=run.batch_size, rows=rows)
        while self.step < self.run.total_steps:
            try:
                self._stages(loader, terminator)
            except LossError as error:
                self._roll_back(error)

    def _stages(self, loader: Loader, terminator: Terminator) -> None:
        total, ahead = self.run.total_steps, self.passed_over
        batches = loader.iterate(self.step + ahead, total + ahead)
        while self.step < total:
            index, _, end = self.run.stage_at(self.step)
            self._stage(index, end, batches, loader, terminator)

    def _roll_back(self, error: LossError) -> None:
        """Back to the newest checkpoint, or to step 0; the batches up to the bad one will not be seen again.

        Raises:
          DyncompError: the run has no rollbacks, or none left.
        """
        self.checkpoints.settle()
        if self.rolled >= self.run.rollbacks:
            raise self._stopped(error) from None
        rolled, passed_over = self.rolled + 1, self.passed_over + error.step
        self._newest()
        self.rolled, self.passed_over = rolled, passed_over - self.step
        self.say(
            f"{error}; back to step {self.step}, {error.step - self.step} batches are passed over "
            f"(rollback {rolled} of {self.run.rollbacks})"
        )
        self._track()

    def _stage(
        self, index: int, end: int, batches: Any, loader: Loader, terminator: Terminator
    ) -> None:
        assert self.timings and self.bar
        if index not in self.compiled:
            sample = self.engine.batch(loader.batch(self.step))
            with self.bar.doing("compiling"):
                self.compiled[index], seconds = self.engine.compile(index, sample)
            self.compile_seconds.append(seconds)
        compiled = self.compiled[index]
        self.measured: Measured | None = Measured(compiled, self.state)
        seed = np.int32(self.run.seed)
        self.timings.reset()
        while self.step < end:
            if self.tracer:
                self.tracer.before(self.step + 1)
            with self.timings.waiting():
                batch = self.engine.batch(next(batches))
            self.state, out = compiled(self.state, batch, seed)
            self.step += 1
            if self.tracer:
                self.tracer.after(self.step, self.state)
            self.window.add(self.step, out)
            self.timings.count()
            self.bar.update(self.step)
            terminator.look()
            if self._due(index, end, terminator):
                self._pause(index, end, terminator)

    def _due(self, index: int, end: int, terminator: Terminator) -> bool:
        """Whether anything but the next step is to be done now."""
        run, stage = self.run, self.engine.stages[index]
        every = (run.log_every, run.eval_every, run.save_every)
        act = stage.controller_every if stage.controller else 0
        return terminator.asked or self.step == end or any(_at(self.step, n) for n in (*every, act))

    def _pause(self, index: int, end: int, terminator: Terminator) -> None:
        run, stage = self.run, self.engine.stages[index]
        assert self.timings and self.bar
        with self.timings.fetching():
            losses = self.window.flush()
        self.guard.look(losses)  # before anything is saved
        self.timings.pause(self.step)
        if self.measured:  # before evaluation and the copies of a save add to the peak
            self.memory, self.measured = self.measured.report(), None
        if _at(self.step, run.log_every) or self.step == end:
            self._log()
        if _at(self.step, run.eval_every):
            with self.bar.doing("evaluating"):
                found = self.evaluator(self.state.variables, "validation", run.eval_batches)
            self._write("validation", {**found["quality"], **spent(found["compute"])})
        if stage.controller and _at(self.step, stage.controller_every):
            call = lambda batch: self.engine.forward(self.state.variables, batch)
            changed = stage.controller(self.state, call, run.task, self.step)
            self.state = self.engine.settle(index, changed)
        if self.step == end and self.step < run.total_steps:
            self.state = self.engine.enter(index + 1, self.state)
        if _at(self.step, run.save_every) or self.step == run.total_steps or terminator.asked:
            with self.timings.saving():
                self.save()
        if terminator.asked and self.step < run.total_steps:
            self.checkpoints.wait()
            raise Preempted(
                f"stopped by SIGTERM after step {self.step} of {run.total_steps}, which is saved in "
                f"{self.workdir}; run the same command to go on",
                self.exit_code,
            )
        self.timings.reset()

    def _stopped(self, error: LossError) -> DyncompError:
        saved = steps_in(self.workdir)
        last = f"the last good checkpoint is step {saved[-1]}" if saved else "nothing was saved"
        tried = f" after {self.rolled} rollbacks" if self.rolled else ""
        return DyncompError(
            f"{error}{tried}; {last}; lower the learning rate or set clip_norm or rollbacks, then run again"
        )

    def _log(self) -> None:
        assert self.bar and self.timings
        values = self.window.values()
        if self.window.events:
            inputs = self.run.task.spec()["inputs"]
            costs = self.run.model.cost((self.run.batch_size // self.run.accumulate, *inputs.shape))
            ledger = Ledger(costs).record(self.window.counts())
            values |= spent(compute(ledger, self.window.elements))
            self.timings.computed(self.step, self._step_flops(ledger))
        self._write("train", values)
        self.bar.logged(values["loss"], self.timings.step_seconds[-1])
        self.window = Window()

    def _step_flops(self, ledger: Ledger) -> dict[str, float]:
        """FLOPs of a step by what the window counted; ``dense`` where there are experts."""
        steps = self.window.steps
        found = {which: ledger.total(which) for which in ("needed", "executed")}
        if any(path.endswith("experts/rows") for path in ledger.entries):
            entries = [(ledger.entries[path], rows) for path, rows in self._every_expert.items()]
            idle = sum((steps * rows - own.executed) * own.cost.flops for own, rows in entries)
            found["dense"] = found["executed"] + idle
        return {which: TRAINED * flops / steps for which, flops in found.items()}

    @functools.cached_property
    def _every_expert(self) -> dict[str, int]:
        return self.engine.rows_of_every_expert()

    def _write(self, split: str, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.write(self.step, split, values)

    def save(self) -> None:
        """Starts saving this step."""
        extra = {
            "window": self.window.dump(),
            "not_loaded": self.not_loaded,
            "recent": list(self.guard.recent),
            "passed_over": self.passed_over,
            "rolled": self.rolled,
        }
        self.checkpoints.save(self.state, extra)

    def finish(self) -> dict[str, Any]:
        """The final evaluation and summary.json."""
        assert self.timings and self.bar
        self.checkpoints.wait()
        run, variables = self.run, self.state.variables
        with self.bar.doing("evaluating"):
            final = self.evaluator(variables, "test", run.final_eval_batches)
            pareto = self.evaluator.pareto(variables, "validation", run.final_eval_batches)
        self._write("test", {**final["quality"], **spent(final["compute"])})
        summary = {
            "step": self.step,
            "quality": final["quality"],
            "compute": final["compute"],
            "ledger": final["ledger"],
            "pareto": pareto,
            "headline": run.task.headline,
            "minimize": run.task.minimize,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "memory": self.memory,
            "timings": {**self.timings.medians(), "compile_seconds": self.compile_seconds},
            "not_loaded": self.not_loaded,
            "passed_over": self.passed_over,
            "notes": self.notes,
            "written": time.strftime("%Y-%m-%d"),
        }
        if run.capture:
            save_decisions(run, variables, self.workdir / "decisions.npz", self.engine.mesh)
            save_exit_outputs(run, variables, self.workdir / "exits.npz", self.engine.mesh)
        processes.from_lead(lambda: records.write_json(self.workdir / "summary.json", summary))
        return summary

    def close(self) -> None:
        """Frees threads and files; what was being saved is completed."""
        if self.tracer:
            self.tracer.stop()
        for thing in (self.bar, self.timings, *self.trackers):
            if thing is not None:
                thing.close()
        # An error of the loop itself matters more than one of a save that was under way.
        if sys.exc_info()[1] is None:
            self.checkpoints.close()
        else:
            self.checkpoints.abandon()


def _at(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
