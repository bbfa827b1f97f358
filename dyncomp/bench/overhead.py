"""`dyncomp bench overhead`: what the library adds to a training loop, and what real data add to a step.

*train_loop*: the loop of `dyncomp.training.train` as users run it (loader, window, log lines; no progress bar, no save
inside the times) against the loop of `dyncomp.bench.plain` with the same parameters, batches and optimizer. The plain
loop takes its turn at every log line.

*mesh_of_one*: the step compiled for a mesh of one device, batches placed on it, against the plain step; and whether the
two compiled programs are the same, instruction for instruction.

*input*: the compiled step fed by the loader against the same step on one batch that is already there.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import models
from dyncomp.attention import Attention
from dyncomp.bench import fresh, plain, timing
from dyncomp.core.typing import Factory
from dyncomp.experts import MoE, SwiGLU
from dyncomp.models.group import Execution
from dyncomp.parallel import MeshSpec
from dyncomp.parallel.hlo import anonymous
from dyncomp.routers import TopP
from dyncomp.tasks import CodeLM, LMObjective
from dyncomp.tasks.loader import Loader
from dyncomp.training import AdamW, Run
from dyncomp.training.engine import Engine
from dyncomp.training.loop import Session
from dyncomp.training.preemption import Terminator

GOAL, INPUT_GOAL, MESH_GOAL = 1.03, 1.05, 1.02
LOSSES = {"balance": 1e-2, "entropy": 1e-4}
P, MAX_P = 0.4, 0.6


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a measurement; the defaults are those of configs/sizes/lm_laptop.gin.

    Attributes:
      pairs: stretches of either side.
      steps: train steps of a stretch.
      hidden: of the dense unit; ``experts`` experts are a half of it each.
      max_bytes: of text; 0 for all.
    """

    pairs: int = 40
    steps: int = 10
    batch: int = 16
    context: int = 128
    d_model: int = 128
    depth: int = 4
    hidden: int = 344
    experts: int = 8
    max_bytes: int = 0


QUICK = Scale(6, 2, 4, 16, 16, 1, 32, 4, 100_000)


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a model and way to run its layers, then the input; ``quick`` takes one model."""
    scale = QUICK if quick else Scale()
    found = [_loop_row("train_loop", scale, dense_ffn(scale), plain.Shape(scan=False))]
    if not quick:
        top_p = functools.partial(top_p_shape, scale)
        found += [
            _loop_row("train_loop_scan", scale, dense_ffn(scale), plain.Shape(scan=True)),
            _loop_row("train_loop_top_p", scale, top_p_ffn(scale), top_p(scan=False)),
            _loop_row("train_loop_top_p_scan", scale, top_p_ffn(scale), top_p(scan=True)),
        ]
        found.append(_mesh_row("mesh_of_one_top_p", quick))
    return [*found, _mesh_row("mesh_of_one", quick), _input_row(scale)]


def dense_ffn(scale: Scale) -> Factory:
    """The dense unit."""
    return functools.partial(SwiGLU, hidden=scale.hidden)


def top_p_ffn(scale: Scale) -> Factory:
    """Top-p experts."""
    router = functools.partial(TopP, p=P, max_p=MAX_P)
    sizes = {"num_experts": scale.experts, "hidden": scale.hidden // 2}
    return functools.partial(MoE, router=router, **sizes)


def top_p_shape(scale: Scale, *, scan: bool) -> plain.Shape:
    """The plain model of `top_p_ffn`."""
    slots = TopP(num_experts=scale.experts, p=P, max_p=MAX_P, parent=None).slots
    return plain.Shape(scan, P, slots, LOSSES["balance"], LOSSES["entropy"])


def make_run(scale: Scale, ffn: Factory, steps: int, layers: Execution) -> Run:
    """A byte-level language model on the embedded code corpus."""
    mixer = functools.partial(Attention, heads=4, kv_heads=2)
    groups = [models.Group([functools.partial(models.Block, mixer=mixer, ffn=ffn)], scale.depth)]
    model = models.DecoderLM(
        vocab_size=256, d_model=scale.d_model, groups=groups, layers=layers, parent=None
    )
    moe = isinstance(ffn, functools.partial) and ffn.func is MoE
    objective = LMObjective(aux_weights=LOSSES if moe else {})
    task = CodeLM(context=scale.context, max_bytes=scale.max_bytes)
    fields: dict[str, Any] = {"optimizer": AdamW(learning_rate=1e-3), "objective": objective}
    fields |= {"log_every": scale.steps, "save_every": steps, "batch_size": scale.batch}
    return Run(model=model, task=task, steps=steps, **fields)


class PlainLoop:
    """The hand-written loop with its own copy of the parameters; reads the same windows from memory.

    Args:
      run: whose first batches and parameters it takes.
      shape: the model.
      steps: how many batches to hold.
    """

    def __init__(self, run: Run, shape: plain.Shape, steps: int):
        stage = run.plan()[0]
        tx = stage.optimizer.build(stage.steps)
        self.params = plain.from_library(Engine(run).fresh().params)
        self.opt_state, self.step = tx.init(self.params), plain.make_step(tx, shape)
        loader = Loader(run.task.source("train"), seed=run.seed, batch_size=run.batch_size)
        taken = [loader.batch(step) for step in range(steps)]
        join = lambda b: np.concatenate([b["inputs"], b["targets"][:, -1:]], axis=1)
        self.windows, self.batch = np.concatenate([join(b) for b in taken]), run.batch_size
        self.losses: list[float] = []

    def __call__(self, start: int, count: int) -> None:
        """Steps ``start`` .. ``start + count - 1``, and the mean loss as a log line would have it."""
        losses = []
        for index in range(start, start + count):
            tokens = self.windows[index * self.batch : (index + 1) * self.batch]
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
            self.params, self.opt_state, loss = self.step(self.params, self.opt_state, batch)
            losses.append(loss)
        self.losses.append(float(np.mean(jax.device_get(losses))))


class Turns:
    """A tracker that times the stretch of training since the last log line, then a stretch of ``peer``.

    The first stretch of both warms up.

    Args:
      peer: runs ``count`` steps from ``start`` on.
      steps: from one log line to the next.
    """

    def __init__(self, peer: Callable[[int, int], None], steps: int):
        self.peer, self.steps, self.pairs = peer, steps, timing.Pairs()
        self.running: timing.Stopwatch | None = None

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Takes both times."""
        if self.running:
            self.running.stop(self.pairs.ours, self.pairs.ours_cpu)
        clock = timing.Stopwatch()
        self.peer(step - self.steps, self.steps)
        if self.running:
            clock.stop(self.pairs.peer, self.pairs.peer_cpu)
        self.running = timing.Stopwatch()

    def close(self) -> None:
        """Nothing is open."""


def loop_pairs(scale: Scale, ffn: Factory, shape: plain.Shape) -> timing.Pairs:
    """Times of real and plain loop, ``scale.steps`` steps each in turn."""
    total = scale.steps * (scale.pairs + 1)
    run = make_run(scale, ffn, total, "scan" if shape.scan else "unroll")
    turns = Turns(PlainLoop(run, shape, total), scale.steps)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(run, Path(folder), "", [], 75)
        with session.engine.context(), Terminator() as terminator:
            session.restore()
            session.start((), progress=False)
            session.trackers.append(turns)
            session.steps(terminator)
        session.close()
    return turns.pairs


def _loop_row(name: str, scale: Scale, ffn: Factory, shape: plain.Shape) -> dict[str, Any]:
    layers = "scanned" if shape.scan else "unrolled"
    reference = (
        f"seconds of {scale.steps} steps of the training loop / of a loop in plain jax.numpy; same model, "
        f"parameters, batches and optimizer, layers {layers} on both sides"
    )
    pairs = loop_pairs(scale, ffn, shape)
    goal: dict[str, Any] = {"goal": GOAL, "relation": "<="}
    peer = "hand-written loop in plain jax.numpy"
    return timing.row_of_pairs(f"overhead/{name}", pairs, reference=reference, peer=peer, **goal)


def _input_row(scale: Scale) -> dict[str, Any]:
    """The loader runs on while the cached batch takes its turn, so a stretch starts and ends with a full buffer."""
    warm_up = 2
    total = scale.steps * (scale.pairs + warm_up)
    run = make_run(scale, dense_ffn(scale), total, "unroll")
    loader = Loader(run.task.source("train"), seed=run.seed, batch_size=run.batch_size)
    engine, cached = Engine(run), loader.batch(0)
    compiled, _ = engine.compile(0, cached)
    real = _stepper(engine, compiled, loader.iterate(0, total), scale.steps)
    same = _stepper(engine, compiled, iter(lambda: cached, None), scale.steps)
    pairs = timing.interleaved(real, same, scale.pairs, warm_up)
    reference = f"seconds of {scale.steps} steps on batches of the loader / on one batch in memory"
    goal: dict[str, Any] = {"goal": INPUT_GOAL, "relation": "<="}
    peer = "the same step on one cached batch"
    return timing.row_of_pairs("overhead/input", pairs, reference=reference, peer=peer, **goal)


def _mesh_row(name: str, quick: bool) -> dict[str, Any]:
    """In a process that has one device."""
    one = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    words = {"experts": name.endswith("top_p"), "quick": quick}
    found = fresh.call(f"{__name__}:mesh_pairs", words, environment=one)
    same = "the same" if found["same"] else "not the same"
    reference = f"seconds of {found['steps']} steps on a mesh of one device / without a mesh"
    more: dict[str, Any] = {"goal": MESH_GOAL, "relation": "<="}
    more |= {"peer": "the step without a mesh", "same_program": found["same"]}
    more |= {"instructions": found["instructions"]}
    reference += f"; the compiled programs are {same}"
    pairs = timing.Pairs(**found["pairs"])
    return timing.row_of_pairs(f"overhead/{name}", pairs, reference=reference, **more)


def mesh_pairs(experts: bool, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: on a mesh of one device), and both compiled programs held against each other."""
    scale = QUICK if quick else Scale()
    ffn = top_p_ffn(scale) if experts else dense_ffn(scale)
    plain_run = make_run(scale, ffn, scale.steps * (scale.pairs + 2), "unroll")
    batch = Loader(plain_run.task.source("train"), seed=0, batch_size=scale.batch).batch(0)
    sides, programs = [], []
    for mesh in (MeshSpec(), None):
        engine = Engine(plain_run.replace(mesh=mesh))
        with engine.context():
            compiled, _ = engine.compile(0, engine.batch(batch))
            sides.append(_stepper(engine, compiled, iter(lambda: batch, None), scale.steps))
        programs.append(anonymous(compiled.as_text()))
    pairs = timing.interleaved(sides[0], sides[1], scale.pairs)
    found = {"pairs": vars(pairs), "steps": scale.steps, "instructions": len(programs[1])}
    return {**found, "same": programs[0] == programs[1]}


def _stepper(
    engine: Engine, compiled: Any, batches: Iterator[Any], steps: int
) -> Callable[[], None]:
    state = [engine.fresh()]
    seed = np.int32(0)

    def stretch() -> None:
        for _ in range(steps):
            state[0], out = compiled(state[0], engine.batch(next(batches)), seed)
        jax.block_until_ready(state[0])

    return stretch
