"""Jobs of several processes of this host, and runs whose data leave a trace; imported by tests and by the processes."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from tiny import N, Regression, make_run

from dyncomp import attention, experts, models, routers, tasks
from dyncomp.bench.meshes import EASY
from dyncomp.cli.supervise import spawned
from dyncomp.core.metrics import Mean
from dyncomp.tasks.base import ArraySource, Task
from dyncomp.training import AdamW, Run

HERE = Path(__file__).parent
MEMBER = """
import sys
sys.path.insert(0, {here!r})
import several
several.member(*sys.argv[1:])
"""


def together(workdir, processes, devices, *words):
    """Runs `member` in so many processes of so many devices each; the error output of the first."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {EASY}"}
    started = []
    for place in spawned(processes):
        given = [place.coordinator, str(processes), str(place.process), str(workdir), *words]
        command = [sys.executable, "-c", MEMBER.format(here=str(HERE)), *given]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **flags}, **pipes))
    try:
        said = [process.communicate(timeout=500)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return said[0]


def member(coordinator, processes, process, workdir, name, *words):
    """One process of a job: trains the runs of one of the functions below."""
    from dyncomp.parallel import processes as job
    from dyncomp.training.loop import train

    if int(processes) > 1:
        job.join(coordinator, int(processes), int(process))
    for folder, run in globals()[name](workdir, *words).items():
        train(run, Path(workdir) / folder, progress=False)


def family(workdir):
    """A dense language model, one of experts, a classifier with exits."""
    mixer = functools.partial(attention.Attention, heads=2, kv_heads=2)
    router = functools.partial(routers.TopP, p=0.6)
    units = {
        "dense": functools.partial(experts.SwiGLU, hidden=16),
        "moe": functools.partial(experts.MoE, router=router, num_experts=4, hidden=8),
    }
    runs = {}
    for name, unit in units.items():
        groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=unit)], 1)]
        model = models.DecoderLM(vocab_size=16, d_model=8, groups=groups)
        weights = {"balance": 1e-2} if name == "moe" else {}
        objective = tasks.LMObjective(aux_weights=weights)
        runs[name] = _run(model, Tokens(), objective=objective, capture=False)
    seeing = functools.partial(attention.Attention, heads=2, causal=False)
    block = functools.partial(
        models.Block, mixer=seeing, ffn=functools.partial(experts.MLP, hidden=8)
    )
    backbone = functools.partial(
        models.VisionTransformer, classes=10, patch=4, d_model=8, groups=[models.Group([block], 2)]
    )
    return {**runs, "exits": _run(models.ExitingClassifier(backbone=backbone), tasks.Digits())}


def _run(model, task, **fields):
    # A large epsilon: the usual 1e-8 divides gradients that are rounding noise by their own size.
    optimizer = AdamW(learning_rate=1e-2, eps=1e-2)
    fields |= {"log_every": 1, "final_eval_batches": 3}
    return Run(model=model, task=task, optimizer=optimizer, steps=6, batch_size=8, **fields)


@dataclasses.dataclass(frozen=True)
class Tokens(Task):
    """Random tokens."""

    def source(self, split):
        rng = np.random.default_rng(len(split))
        tokens = rng.integers(0, 16, (60, 9)).astype(np.int32)
        return TokenSource({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})

    def objective(self):
        return tasks.LMObjective()

    def metrics(self, output, batch):
        nll = -jax.nn.log_softmax(output)[..., 0]
        return {"loss": Mean.of(nll, batch["mask"])}


class TokenSource(ArraySource):
    """With a mask of every token."""

    def batch(self, indices):
        rows = super().batch(indices)
        return {**rows, "mask": np.ones(rows["inputs"].shape, np.float32)}


@dataclasses.dataclass(frozen=True)
class Traced(Regression):
    """Every process writes down which training examples it reads."""

    folder: str = ""

    def spec(self):
        return Regression().spec()

    def source(self, split):
        found = super().source(split)
        if split != "train":
            return found
        trace = Path(self.folder) / f"read.{jax.process_index()}.jsonl"
        return TracedSource(found.arrays, trace)


@dataclasses.dataclass(frozen=True)
class TracedSource(ArraySource):
    """Appends the indices of every batch to a file."""

    trace: Path = Path()

    def batch(self, indices):
        with self.trace.open("a") as stream:
            stream.write(json.dumps(indices.tolist()) + "\n")
        return super().batch(indices)


def traced(workdir, steps):
    """A run of half an epoch or so."""
    steady = AdamW(learning_rate=1e-2, schedule="constant")
    task = Traced(folder=str(workdir))
    fields = {
        "task": task,
        "optimizer": steady,
        "steps": int(steps),
        "save_every": 2,
        "log_every": 1,
    }
    return {"run": make_run(**fields)}


def taken_traces(workdir):
    """Examples that each process has read since the last call, by process."""
    found = {}
    for path in sorted(Path(workdir).glob("read.*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = {index for line in lines for index in line}
        path.unlink()
    return found


__all__ = ["N", "family", "member", "taken_traces", "together", "traced"]
