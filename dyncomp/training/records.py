"""What a work directory holds beside checkpoints and metrics: config, environment, timings, summary."""

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from dyncomp.core.environment import differences, run_environment
from dyncomp.core.errors import DyncompError
from dyncomp.parallel import processes


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes in one step of the file system, so that no reader sees half a file."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1, default=str) + "\n")
    scratch.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a file, or None when it is missing or cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def look_at(workdir: Path, config_text: str, quick: bool) -> list[str]:
    """What differs from an earlier part of the run, a line each; nothing is written.

    Raises:
      DyncompError: the folder holds a smoke run and this is none, or the other way round.
    """
    before = read_json(workdir / "environment.json")
    if before is None:
        return []
    if before.get("quick") != quick:
        kind = "a --quick run" if before.get("quick") else "a full run"
        raise DyncompError(f"{workdir} holds {kind}; use another --workdir or delete it")
    changed = differences(before, {**run_environment(), "quick": quick})
    notes = [f"warning: resumed numbers may differ in their last bits: {line}" for line in changed]
    config = workdir / "config.gin"
    if config.exists() and config.read_text() != config_text:
        notes.append(f"warning: {config} was another config; this run goes on with the new one")
    return notes


def finished(workdir: Path, config_text: str, total_steps: int) -> dict[str, Any] | None:
    """The summary of a run of this very config that has nothing left to do, else None."""
    config = workdir / "config.gin"
    if not config.exists() or config.read_text() != config_text:
        return None
    summary = read_json(workdir / "summary.json")
    return summary if summary and summary.get("step") == total_steps else None


def take_over(workdir: Path, config_text: str, quick: bool) -> None:
    """Makes the folder this run's: config and environment; the summary of another config goes.

    Called once it is known that what the folder holds can be gone on with.
    """
    config = workdir / "config.gin"
    if config.exists() and config.read_text() != config_text:
        (workdir / "summary.json").unlink(missing_ok=True)
    config.write_text(config_text)
    write_json(workdir / "environment.json", {**run_environment(), "quick": quick})


class Timings:
    """Wall-clock figures, apart from metrics.jsonl because they differ every time.

    A record is one stretch between two pauses: seconds a step, the share of time spent waiting for input (of the
    process that waited longest), and the seconds that the loop stood still for a checkpoint before it. With several
    processes also ``straggler``, the one whose host was at work for longest, and ``straggle``, by how many seconds a
    step more than the median: the others waited for it. A slow device makes all hosts wait alike and does not show.

    Where a model says what it computed, a record of its own at every log line: FLOPs a second that the plan needed,
    that were executed and, with experts, that every expert on every token would have taken; and these as shares of
    ``peak``, ``mfu``, ``mfu_executed`` and ``mfu_dense``.

    Args:
      path: where records are appended; None where another process writes them.
      peak: FLOPs a second of all devices of the run together; None where it is not known.
    """

    def __init__(self, path: Path | None, peak: float | None = None):
        self.stream = path.open("a") if path else None
        self.peak = peak
        self.since_log = [0, 0.0]  # steps, seconds
        self.mfu: list[float] = []
        self.step_seconds: list[float] = []
        self.stalls: list[float] = []
        self.saves: list[float] = []
        self.straggles: list[float] = []
        self.saved = 0.0
        self.reset()

    def reset(self) -> None:
        """Starts a stretch."""
        self.began, self.steps, self.waited, self.fetched = time.perf_counter(), 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the body as waiting for input."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        """Counts the body as waiting for the devices, this process's and the others'."""
        began = time.perf_counter()
        yield
        self.fetched += time.perf_counter() - began

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the body as saving; its time goes into the next record."""
        began = time.perf_counter()
        yield
        self.saved = time.perf_counter() - began
        self.saves.append(self.saved)

    def count(self) -> None:
        """One step more was started."""
        self.steps += 1

    def pause(self, step: int) -> None:
        """Ends a stretch, in every process; call after the steps are known to be done."""
        spent = time.perf_counter() - self.began
        if not self.steps:
            return
        own = np.array([self.waited / spent, (spent - self.fetched) / self.steps], np.float32)
        stalls, busy = processes.gather(own).T
        self.step_seconds.append(spent / self.steps)
        self.since_log = [self.since_log[0] + self.steps, self.since_log[1] + spent]
        self.stalls.append(float(stalls.max()))
        record = {"step": step, "seconds_per_step": spent / self.steps, "stall": self.stalls[-1]}
        record |= {"checkpoint": self.saved}
        if len(busy) > 1:
            self.straggles.append(float(busy.max() - np.median(busy)))
            record |= {"straggler": int(busy.argmax()), "straggle": self.straggles[-1]}
        self.saved = 0.0
        self._write(record)

    def computed(self, step: int, flops: Mapping[str, float]) -> None:
        """Turns FLOPs into rates; call where a log line is written.

        Args:
          step: the last one.
          flops: of a whole step, forward and twice as many for the gradients (what the backward pass computes again is
            not in it): ``needed`` by the plan, ``executed``, and ``dense`` where there are experts.
        """
        steps, seconds = self.since_log
        self.since_log = [0, 0.0]
        if not steps:
            return
        rates = {which: each * steps / seconds for which, each in flops.items()}
        record = {"step": step, **{f"flops_{which}_per_second": r for which, r in rates.items()}}
        if self.peak:
            shares = {f"mfu_{which}": rate / self.peak for which, rate in rates.items()}
            self.mfu.append(shares.pop("mfu_needed"))
            record |= {"mfu": self.mfu[-1], **shares}
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.stream:
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()

    def medians(self) -> dict[str, float]:
        """Medians over the stretches of this process, as far as there are any."""
        figures = {
            "seconds_per_step": self.step_seconds,
            "input_stall": self.stalls,
            "checkpoint_seconds": self.saves,
            "straggle_seconds": self.straggles,
            "mfu": self.mfu,
        }
        return {name: statistics.median(values) for name, values in figures.items() if values}

    def close(self) -> None:
        """Closes the file."""
        if self.stream:
            self.stream.close()


class Bar:
    """A progress bar on standard error, or nothing: name, steps, steps a second, loss or what is going on.

    Args:
      name: of the run.
      total: steps in all.
      step: where the run goes on.
      shown: False draws nothing.
      console: where to; default standard error.
    """

    def __init__(
        self, name: str, total: int, step: int, shown: bool, console: Console | None = None
    ):
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        console = console or Console(stderr=True)
        self.progress = Progress(*columns, console=console, disable=not shown)
        self.task = self.progress.add_task(name, total=total, completed=step, note="")
        self.last = ""
        self.progress.start()

    def update(self, step: int) -> None:
        """Moves the bar; drawing happens on a thread of its own."""
        self.progress.update(self.task, completed=step)

    def logged(self, loss: float, seconds: float) -> None:
        """Shows the loss of a log line and the seconds a step took since the last one.

        The bar itself runs ahead: a step is counted when it is started, and the loop waits only to log.
        """
        self.last = f"{1 / seconds:.3g} steps/s loss {loss:.4g}"
        self.progress.update(self.task, note=self.last)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what takes its time while no step is taken, such as "compiling"."""
        self.progress.update(self.task, note=what)
        yield
        self.progress.update(self.task, note=self.last)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self.progress.stop()
