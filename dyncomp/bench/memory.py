"""`dyncomp bench memory`: what XLA says a train step takes against what a fresh process really grows by.

XLA's figure is arguments + outputs + temporaries - aliased of the compiled step. The measured one is the growth of the
resident set from before the first step to its peak, plus the state, which is resident before. `dyncomp run` reports
the same two figures of every run.
"""

import functools
from typing import Any

import jax
import numpy as np

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.bench import fresh, timing
from dyncomp.experts import SwiGLU
from dyncomp.tasks import CodeLM
from dyncomp.training import AdamW, Run
from dyncomp.training.engine import Engine
from dyncomp.training.memory import Measured

GOAL, RUNS, STEPS = 0.15, 6, 2
ACTIVATIONS = {"d_model": 128, "depth": 4, "hidden": 344, "context": 512, "batch": 32}
PARAMETERS = {"d_model": 768, "depth": 12, "hidden": 2048, "context": 64, "batch": 2}
TINY = {"d_model": 32, "depth": 2, "hidden": 64, "context": 64, "batch": 8}


def rows(quick: bool) -> list[dict[str, Any]]:
    """A step whose activations and one whose parameters fill the memory; ``quick`` takes a tiny one."""
    if quick:
        return [_row("tiny", TINY, 1)]
    return [_row("activations", ACTIVATIONS, RUNS), _row("parameters", PARAMETERS, RUNS)]


def step_bytes(
    *, d_model: int, depth: int, hidden: int, context: int, batch: int
) -> dict[str, int | None]:
    """Both figures of the train step of a byte-level language model, as `Measured` reports them."""
    mixer = functools.partial(Attention, heads=4)
    block = functools.partial(
        models.Block, mixer=mixer, ffn=functools.partial(SwiGLU, hidden=hidden)
    )
    groups = [models.Group([block], depth)]
    model = models.DecoderLM(vocab_size=256, d_model=d_model, groups=groups, parent=None)
    task, optimizer = CodeLM(context=context), AdamW(learning_rate=1e-3)
    run = Run(model=model, task=task, optimizer=optimizer, steps=STEPS, batch_size=batch)
    engine = Engine(run)
    spec = task.spec().items()
    zeros = {name: np.zeros((batch, *leaf.shape), leaf.dtype) for name, leaf in spec}
    compiled, _ = engine.compile(0, zeros)
    state = engine.fresh()
    measured = Measured(compiled, state)
    for _ in range(STEPS):
        state, _ = jax.block_until_ready(compiled(state, zeros, np.int32(0)))
    return measured.report()


def _row(name: str, sizes: dict[str, int], runs: int) -> dict[str, Any]:
    found = [fresh.call(f"{__name__}:step_bytes", sizes) for _ in range(runs)]
    ratios = [each["xla_bytes"] / each["measured_bytes"] for each in found]
    ratio, interval = timing.median_interval(ratios)
    return timing.row(
        f"memory/{name}",
        ratio,
        interval,
        goal=GOAL,
        relation="abs(ratio - 1) <= goal",
        reference="bytes that XLA gives for the step / growth of the resident set of a fresh process",
        peer="resident set",
        runs=runs,
        median_ours=float(np.median([each["xla_bytes"] for each in found])),
        median_peer=float(np.median([each["measured_bytes"] for each in found])),
    )
