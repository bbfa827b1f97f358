"""`dyncomp bench compile`: seconds from a train step to a program, each time in a fresh process without a cache.

Seconds are those of tracing, lowering and compiling (`Engine.compile`), summed over the stages of a run.
"""

from typing import Any

import numpy as np

from dyncomp import config
from dyncomp.bench import fresh, timing
from dyncomp.training.engine import Engine
from dyncomp.training.run import Run
from dyncomp.training.suite import Suite

SECONDS, GROWTH = 20.0, 1.5
RUNS = 6  # the fewest that give an interval of 95%
DEEP, SHALLOW = "sizes/lm_deep.gin", "sizes/lm_laptop.gin"
PROGRAM = """
from __gin__ import dynamic_registration
from dyncomp import models
from dyncomp import tasks
from dyncomp import training
include '{size}'
training.Run.model = @models.DecoderLM()
training.Run.task = @tasks.CodeLM()
training.Run.optimizer = @training.AdamW()
training.AdamW.learning_rate = 1e-3
training.Run.steps = 1000
"""


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a run of every laptop config, and depth; ``quick`` takes one run of one config, and each once."""
    names = [name for name in config.slugs() if not name.endswith("_paper")]
    runs = 1 if quick else RUNS
    targets = [(name, member) for name in names for member in members(name)]
    return [_seconds_row(*each, runs) for each in targets[: 1 if quick else None]] + [
        _depth_row(runs)
    ]


def members(name: str) -> list[str]:
    """Names of a config's runs; "" for a config that is one run."""
    built = config.load(name)
    return list(built.runs) if isinstance(built, Suite) else [""]


def compile_seconds(name: str, member: str) -> float:
    """Seconds to compile the train steps of a run's stages, on batches of zeros.

    Args:
      name: of a shipped config, or the text of one.
      member: of a suite; "" for a config that is one run.
    """
    built = config.load(name)
    run = built.runs[member] if isinstance(built, Suite) else built
    assert isinstance(run, Run)
    engine = Engine(run)
    spec = run.task.spec().items()
    batch = {key: np.zeros((run.batch_size, *leaf.shape), leaf.dtype) for key, leaf in spec}
    with engine.context():
        return sum(engine.compile(index, batch)[1] for index in range(len(engine.stages)))


def _measured(name: str, member: str = "") -> float:
    return fresh.call(f"{__name__}:compile_seconds", {"name": name, "member": member})


def _seconds_row(name: str, member: str, runs: int) -> dict[str, Any]:
    seconds = [_measured(name, member) for _ in range(runs)]
    median, interval = timing.median_interval(seconds)
    return timing.row(
        f"compile/{name}/{member}".rstrip("/"),
        median,
        interval,
        goal=SECONDS,
        relation="<=",
        reference="seconds to trace, lower and compile the train step; fresh process, no cache",
        runs=runs,
        median_ours=median,
        each=seconds,
    )


def _depth_row(runs: int) -> dict[str, Any]:
    pairs = timing.Pairs()
    for _ in range(runs):
        pairs.ours.append(_measured(PROGRAM.format(size=DEEP)))
        pairs.peer.append(_measured(PROGRAM.format(size=SHALLOW)))
    ratio, interval = timing.median_interval(pairs.ratios())
    deep, shallow = pairs.seconds()
    return timing.row(
        "compile/depth",
        ratio,
        interval,
        goal=GROWTH,
        relation="<=",
        reference="seconds to compile the train step of 24 layers / of 4 layers of the same width",
        peer="4 layers",
        runs=runs,
        median_ours=deep,
        median_peer=shallow,
    )
