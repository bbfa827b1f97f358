"""`dyncomp bench faults`: a job that loses a process ends soon, with one line, and goes on to the same bits.

The run is a small vision transformer on scikit-learn's digits, in processes of this host that talk over loopback. A
fault comes a random number of steps after the job has resumed, while checkpoints are being written: a worker is killed
(SIGKILL), process 0, which coordinates the others, is killed, or any process is stopped (SIGSTOP). Each time the job
must end by itself within a minute with the exit code that asks a scheduler to start it again.
"""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from dyncomp.bench import timing
from dyncomp.core.errors import DyncompError

CONFIG = """\
from __gin__ import dynamic_registration
from dyncomp import models
from dyncomp import tasks
from dyncomp import training

include 'base/vit.gin'

CLASSES = 10
PATCH = 4
D_MODEL = 8
DEPTH = 1
HEADS = 2
HIDDEN = 16

training.Run.model = @models.VisionTransformer()
training.Run.task = @tasks.Digits()
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 1e-3
training.Run.steps = {steps}
training.Run.batch_size = 16
training.Run.ema = 0.99
training.Run.log_every = 1
training.Run.save_every = 7
training.Run.capture = False
"""
KINDS = ("worker", "coordinator", "stopped")
PROCESSES, FAULTS, MOST_STEPS = 4, 10, 20
LIMIT_SECONDS = 60.0
SAID = (
    "share of faults after which a job of {processes} processes ended within 60 s with one line and 75, and after "
    "which it had the bits of one without a fault"
)
LOST = r"process (\d+) of (\d+) was lost \(.*\); (step \d+|nothing) is saved in .*; run the same .* to go on"


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of some faults.

    Attributes:
      seconds: from each fault to the end of the job.
      wrong: what was not as promised, a line each: exit code, time, words, or bits that differ.
    """

    seconds: tuple[float, ...]
    wrong: tuple[str, ...]


def job(config: Path, workdir: Path, processes: int) -> subprocess.Popen:
    """Starts the run in ``processes`` processes of one device each; it resumes by itself."""
    words = ["run", str(config), "--workdir", str(workdir), "--no-progress", "--spawn", processes]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "dyncomp", *map(str, words)],
        env={**os.environ, **flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def member(parent: subprocess.Popen, index: int) -> int:
    """Process id of a process of the job."""
    for child in psutil.Process(parent.pid).children():
        if child.environ().get("DYNCOMP_PROCESS") == str(index):
            return child.pid
    raise DyncompError(f"process {index} of the job is not there")


def hit(kind: str, parent: subprocess.Popen, processes: int, draw: random.Random) -> int:
    """Makes one fault; returns the index of the process it hit."""
    first = {"worker": 1, "coordinator": 0, "stopped": 0}[kind]
    last = 0 if kind == "coordinator" else processes - 1
    index = draw.randint(first, last)
    number = signal.SIGSTOP if kind == "stopped" else signal.SIGKILL
    os.kill(member(parent, index), number)
    return index


def lines_of(path: Path) -> int:
    """How many lines a file has; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ended(parent: subprocess.Popen, index: int, processes: int) -> tuple[float, list[str]]:
    """(seconds the job took to end, what was not as promised)."""
    began = time.monotonic()
    try:
        said = parent.communicate(timeout=2 * LIMIT_SECONDS)[1].strip().splitlines()
    except subprocess.TimeoutExpired:
        parent.kill()
        return 2 * LIMIT_SECONDS, ["the job did not end"]
    seconds, wrong = time.monotonic() - began, []
    if seconds > LIMIT_SECONDS:
        wrong.append(f"it took {seconds:.0f} s to end")
    if parent.returncode != 75:
        wrong.append(f"exit code {parent.returncode}")
    told = [line for line in said if not line.startswith("warning: resumed")]
    found = re.fullmatch(LOST, told[-1]) if told else None
    if len(told) != 1 or found is None or found.groups()[:2] != (str(index), str(processes)):
        wrong.append(f"process {index} was hit and it said {told}")
    return seconds, wrong


def through_faults(
    folder: Path,
    kinds: Sequence[str],
    *,
    processes: int = PROCESSES,
    most_steps: int = MOST_STEPS,
    seed: int = 0,
) -> Result:
    """Trains once undisturbed and once through a fault of each of ``kinds``, in order, and compares.

    Args:
      folder: gets both work directories.
      kinds: of `KINDS`.
      processes: of the job.
      most_steps: that a job takes before its fault.
      seed: of the moments and of the processes hit.
    """
    from dyncomp.bench.kills import differences

    draw, seconds, wrong = random.Random(seed), [], []
    config = folder / "faults.gin"
    config.write_text(CONFIG.format(steps=2 * most_steps * (len(kinds) + 1)))
    _finish(job(config, folder / "whole", processes))
    for kind in kinds:
        metrics = folder / "killed" / "metrics.jsonl"
        before, parent = _inode(metrics), job(config, folder / "killed", processes)
        _await(parent, metrics, before, draw.randint(1, most_steps))
        took, found = ended(parent, hit(kind, parent, processes, draw), processes)
        seconds.append(took)
        wrong += [f"{kind}: {what}" for what in found]
    _finish(job(config, folder / "killed", processes))
    wrong += [f"{what} differs" for what in differences(folder)]
    return Result(tuple(seconds), tuple(wrong))


def _await(parent: subprocess.Popen, metrics: Path, before: int | None, steps: int) -> None:
    """Waits until the job has logged ``steps`` steps; it makes the file anew when it resumes."""
    start = None
    while parent.poll() is None:
        if start is None and _inode(metrics) != before:
            start = lines_of(metrics)
        if start is not None and lines_of(metrics) >= start + steps:
            return
        time.sleep(0.005)
    raise DyncompError(f"the run ended before its fault: {parent.communicate()[1].strip()[-300:]}")


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _finish(parent: subprocess.Popen) -> None:
    said = parent.communicate()[1].strip().splitlines()
    if parent.returncode:
        raise DyncompError(f"the run failed by itself: {said[-1:]}")


def rows(quick: bool) -> list[dict[str, Any]]:
    """A row for each kind of fault: the share of faults after which all was as promised."""
    processes, faults = (2, 1) if quick else (PROCESSES, FAULTS)
    made = []
    for seed, kind in enumerate(KINDS):
        with tempfile.TemporaryDirectory() as folder:
            result = through_faults(Path(folder), [kind] * faults, processes=processes, seed=seed)
        share = 1 - min(len(result.wrong), faults) / faults
        row = timing.row(
            f"faults/{kind}",
            share,
            (share, share),
            goal=1.0,
            relation=">=",
            holds=not result.wrong,
            reference=SAID.format(processes=processes),
            runs=len(result.seconds),
            seconds=result.seconds,
            wrong=result.wrong,
        )
        made.append(row)
    return made
