"""`dyncomp bench kills`: a run killed without warning at random moments ends with the bits of an uninterrupted one.

The run is a small vision transformer on scikit-learn's digits. Every kill is SIGKILL to a process of its own, a random
number of steps and a random fraction of a second after it resumed, while checkpoints are being written in the
background.
"""

import dataclasses
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dyncomp.bench import timing
from dyncomp.core.errors import DyncompError

CHILD = """
import os, signal, sys, threading
from dyncomp.bench.kills import tiny_run
from dyncomp.training.loop import train
from dyncomp.training.window import Window
workdir, total, steps, delay = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
die, add, taken = (lambda: os.kill(os.getpid(), signal.SIGKILL)), Window.add, []
def counted(self, step, out):
    add(self, step, out)
    taken.append(step)
    if len(taken) == steps:
        threading.Timer(delay, die).start()
if steps:
    Window.add = counted
train(tiny_run(total), workdir, progress=False)
"""
SAVE_EVERY, MOST_STEPS, MOST_DELAY = 7, 20, 0.05


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
      kills: how many processes were killed.
      resumed_at: the newest complete step after each kill, 0 for none.
      differs: what is not the same bit for bit; empty when all is.
    """

    kills: int
    resumed_at: tuple[int, ...]
    differs: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether parameters, averages, moments and metrics agree bit for bit."""
        return not self.differs


def tiny_run(steps: int) -> Any:
    """The run that is killed."""
    import functools

    from dyncomp.attention import Attention
    from dyncomp.experts import MLP
    from dyncomp.models import Block, Group, VisionTransformer
    from dyncomp.tasks import Digits
    from dyncomp.training import AdamW, Run

    mixer = functools.partial(Attention, heads=2, causal=False)
    block = functools.partial(Block, mixer=mixer, ffn=functools.partial(MLP, hidden=16))
    model = VisionTransformer(classes=10, patch=4, d_model=8, groups=[Group([block], 1)])
    every: dict[str, int] = {"log_every": 5, "eval_every": 50, "save_every": SAVE_EVERY}
    optimizer = AdamW(learning_rate=1e-3)
    fields: dict[str, Any] = {"batch_size": 16, "ema": 0.99, "capture": False, **every}
    return Run(model=model, task=Digits(), optimizer=optimizer, steps=steps, **fields)


def _child(workdir: Path, total: int, steps: int = 0, delay: float = 0.0) -> int:
    """Exit status of a process that works on the run, killed ``steps`` steps and ``delay`` seconds on (0: never)."""
    words = [sys.executable, "-c", CHILD, str(workdir), str(total), str(steps), str(delay)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise DyncompError(f"the run failed by itself: {done.stderr.strip().splitlines()[-1:]}")
    return done.returncode


def interrupted_equals_whole(folder: Path, *, kills: int, seed: int = 0) -> Result:
    """Trains once without interruption and once through ``kills`` kills, and compares.

    Args:
      folder: gets both work directories.
      kills: how many; fewer when the run ends before.
      seed: of the moments.
    """
    from dyncomp.core.workdir import steps_in

    total, draw, resumed = 13 * kills + 40, random.Random(seed), []
    _child(folder / "whole", total)
    for _ in range(kills):
        steps, delay = draw.randint(1, MOST_STEPS), draw.uniform(0, MOST_DELAY)
        if _child(folder / "killed", total, steps, delay) == 0:
            break
        resumed.append(max(steps_in(folder / "killed"), default=0))
    _child(folder / "killed", total)
    return Result(len(resumed), tuple(resumed), tuple(differences(folder)))


def differences(folder: Path) -> list[str]:
    """What differs between the two work directories: metrics.jsonl and every array of the last checkpoint."""
    from dyncomp.training.checkpoint import read_newest

    whole, killed = folder / "whole", folder / "killed"
    names = [n for n in ("metrics.jsonl",) if (whole / n).read_bytes() != (killed / n).read_bytes()]
    left, right = read_newest(whole), read_newest(killed)
    both = [path for path in left if path in right]
    names += sorted(set(left) ^ set(right))
    return names + [path for path in both if left[path].tobytes() != right[path].tobytes()]


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row: the share of kills after which everything is equal; 100 kills, 3 with ``quick``."""
    kills = 3 if quick else 100
    with tempfile.TemporaryDirectory() as folder:
        result = interrupted_equals_whole(Path(folder), kills=kills)
    share = float(result.equal)
    row = timing.row(
        "kills/digits",
        share,
        (share, share),
        goal=1.0,
        relation="all bits equal",
        holds=result.equal and result.kills == kills,
        reference="the same run without interruption",
        runs=result.kills,
        differs=result.differs,
    )
    return [row]
