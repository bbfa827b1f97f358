"""One process of a job of `dyncomp bench meshes`: trains on meshes and holds what it sees against one device."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp.bench import mesh_runs
from dyncomp.bench.mesh_runs import BATCH, EXAMPLES, KINDS, STEPS
from dyncomp.core.dtypes import FloatName
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array
from dyncomp.parallel import MeshSpec
from dyncomp.parallel import processes as job
from dyncomp.parallel.shardings import replicated
from dyncomp.tasks.loader import Loader
from dyncomp.training import Run
from dyncomp.training.engine import Engine
from dyncomp.training.loop import train
from dyncomp.training.state import TrainState, paths
from dyncomp.training.step import forward

SEEDS = (0, 1, 2)
PLAN, FOUND = "plan", "found.json"
PARTS = {
    8: {"moe": {"fsdp": 2, "tensor": 2, "expert": 2}, "": {"data": 2, "fsdp": 2, "tensor": 2}},
    4: {"moe": {"data": 2, "expert": 2}, "": {"fsdp": 2, "tensor": 2}},
    2: {"moe": {"expert": 2}, "": {"fsdp": 2}},
}
"""Devices -> the mesh of a kind of model (`""`: of the others) when a run is resumed on so many."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run did.

    Attributes:
      losses: of every step.
      gradients: of the first step, by parameter path.
      examples: int [steps batch], which example stood in each row; -1 where processes disagree or nobody read one.
    """

    losses: list[float]
    gradients: dict[str, np.ndarray]
    examples: np.ndarray


def curves(
    folder: str,
    dtype: FloatName,
    kinds: Sequence[str],
    quick: bool,
    coordinator: str,
    processes: int,
    process: int,
) -> dict[str, Any]:
    """Models on every mesh of all devices; one process of the job first trains on one of its devices alone.

    Returns:
      Kind -> ``alone``: losses by seed; ``meshes``: name -> ``losses``, ``gradients`` (largest
      difference of an element as a share of its parameter's largest), ``epochs`` (each example once an epoch).
    """
    _join(coordinator, processes, process)
    return {kind: _curves(kind, dtype, Path(folder), quick) for kind in kinds}


def _curves(kind: str, dtype: FloatName, folder: Path, quick: bool) -> dict[str, Any]:
    one = folder / f"{kind}-{dtype}"
    if jax.process_count() == 1:
        _once(one, _alone, kind, dtype, one)
    with np.load(one / "first.npz") as file:
        reference = {name: file[name] for name in file.files}
    plan, found = reference.pop(PLAN, None), {}
    for name, spec in mesh_runs.shapes(kind, quick).items():
        own = folder / "-".join([kind, dtype, str(jax.process_count()), *name.split()])
        run = mesh_runs.make_run(kind, dtype, folder=str(own), mesh=spec)
        found[name] = _once(own, _compared, run, plan, reference)
    return {"alone": json.loads((one / FOUND).read_text()), "meshes": found}


def _once(folder: Path, find: Callable[..., Any], *args: Any) -> Any:
    """What ``find`` returns, JSON-ready; where an earlier job left it in ``folder``, that."""
    kept = folder / FOUND
    if kept.exists():
        return json.loads(kept.read_text())
    folder.mkdir(exist_ok=True)
    (folder / _trace()).unlink(missing_ok=True)  # of a job that did not end
    found = find(*args)
    if job.lead():
        kept.write_text(json.dumps(found))
    return found


def _trace() -> str:
    """The file in which `mesh_runs.Excerpt` notes what this process reads."""
    return f"read.{jax.process_index()}.jsonl"


def _join(coordinator: str, count: int, process: int) -> None:
    if count > 1:
        job.join(coordinator, count, process)


def _alone(kind: str, dtype: FloatName, folder: Path) -> dict[str, list[float]]:
    """Losses of one device by seed; gradients and the plan of the first step go into a file."""
    losses = {}
    for seed in SEEDS if dtype == "float32" else SEEDS[:1]:
        run = mesh_runs.make_run(kind, dtype, folder="", seed=seed)
        plan = first_plan(run) if kind == "moe" else None
        seen = train_on(run, plan)
        losses[str(seed)] = seen.losses
        if seed == SEEDS[0]:
            arrays: dict[str, Any] = {**seen.gradients, **({} if plan is None else {PLAN: plan})}
            np.savez(folder / "first.npz", **arrays)
    return losses


def first_plan(run: Run) -> np.ndarray:
    """Who goes where in the first batch, on one device: the control ``told``."""
    engine = Engine(run)
    batch = _loader(run, engine).batch(0)
    _, aux = jax.jit(forward(run, ("plan",)))(engine.fresh().variables, batch)
    is_plan = lambda node: isinstance(node, RoutePlan)
    (plan,) = filter(is_plan, jax.tree.leaves(aux.plans, is_leaf=is_plan))
    return np.asarray(mesh_runs.told(plan))


def _loader(run: Run, engine: Engine) -> Loader:
    source = run.task.source("train")
    return Loader(source, seed=run.seed, batch_size=run.batch_size, rows=engine.rows)


def train_on(run: Run, plan: np.ndarray | None) -> Seen:
    """The compiled step of a run, `STEPS` times on batches of the loader; ``plan`` is replayed in the first."""
    engine, losses = Engine(run), []
    with engine.context():
        state = engine.fresh()
        if plan is not None:
            state = engine.settle(0, _replaying(state, plan))
        batches, compiled = _loader(run, engine).iterate(0, STEPS), None
        for batch in map(engine.batch, batches):
            if compiled is None:
                compiled, _ = engine.compile(0, batch)
            state, out = compiled(state, batch, np.int32(run.seed))
            losses.append(float(out["loss"]))
            if len(losses) == 1 and plan is not None:
                state = engine.settle(0, _replaying(state, None))
        whole = replicated(engine.mesh)
        fetched = jax.device_get(jax.jit(lambda x: x, out_shardings=whole)(state.opt_state.first))
    gradients = dict(zip(paths(fetched), jax.tree.leaves(fetched), strict=True))
    assert isinstance(run.task, mesh_runs.Excerpt)
    return Seen(losses, gradients, _examples(Path(run.task.folder), engine.rows, STEPS))


def _replaying(state: TrainState, plan: np.ndarray | None) -> TrainState:
    """The routers' controls set to replay ``plan``, or to decide by themselves."""

    def put(path: Any, leaf: Array) -> Any:
        if path[-1].key == "told" and plan is not None:
            return plan
        flag = np.full(leaf.shape, plan is not None, leaf.dtype)
        return flag if path[-1].key == "replay" else leaf

    return state.replace(controls=jax.tree_util.tree_map_with_path(put, state.controls))


def _examples(
    folder: Path, rows: np.ndarray, steps: int, again: list[int] | None = None
) -> np.ndarray:
    """`Seen.examples` out of the traces of all processes.

    Args:
      rows: of every batch, those that this process read.
      steps: batches read, in order.
      again: a batch's indices that were read once more (a sample to compile with).
    """
    if not folder.name:
        return np.zeros((0, BATCH), np.int32)
    trace = folder / _trace()
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    if again is not None:
        lines.remove(again)
    trace.unlink()
    own = np.full((steps, BATCH), -1, np.int32)
    if len(lines) == steps:
        own[:, rows] = lines
    parts = job.gather(own)
    agreed = np.max(parts, axis=0)
    return np.where(np.any((parts >= 0) & (parts != agreed), axis=0), -1, agreed)


def once_an_epoch(examples: np.ndarray) -> bool:
    """Whether every whole epoch of [steps batch] examples holds each example once, and the rest none twice."""
    flat = examples.reshape(-1)
    epochs = [flat[start : start + EXAMPLES] for start in range(0, len(flat), EXAMPLES)]
    whole = all(sorted(epoch) == list(range(EXAMPLES)) for epoch in epochs[:-1])
    return whole and len(set(epochs[-1])) == len(epochs[-1]) and bool(np.all(flat >= 0))


def _compared(
    run: Run, plan: np.ndarray | None, reference: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What `train_on` saw, held against one device's first gradients."""
    seen = train_on(run, plan)
    assert seen.gradients.keys() == reference.keys()
    apart = {
        path: float(np.max(np.abs(seen.gradients[path] - one)) / (np.max(np.abs(one)) or 1.0))
        for path, one in reference.items()
    }
    worst = max(apart, key=apart.__getitem__)
    return {
        "losses": seen.losses,
        "gradients": apart[worst],
        "worst": worst,
        "epochs": once_an_epoch(seen.examples),
    }


def part(
    folder: str,
    dtype: FloatName,
    start: int,
    stop: int,
    coordinator: str,
    processes: int,
    process: int,
) -> dict[str, Any]:
    """Every kind from step ``start`` to ``stop`` through `train`, resumed from what other devices saved.

    Returns:
      Kind -> ``losses`` up to ``stop``, ``examples`` since ``start``.
    """
    _join(coordinator, processes, process)
    found = {}
    for kind in KINDS:
        own = Path(folder) / f"resumed-{kind}"
        own.mkdir(exist_ok=True)
        sizes = PARTS[jax.device_count()].get(kind) or PARTS[jax.device_count()][""]
        mesh = MeshSpec(**{"data": 1, **sizes}, rules=None)
        words: dict[str, Any] = {"mesh": mesh, "steps": stop}
        run = mesh_runs.make_run(kind, dtype, folder=str(own), final_eval_batches=1, **words)
        train(run, own / "run", progress=False)
        lines = map(json.loads, (own / "run" / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if line["split"] == "train"]
        loader = _loader(run, Engine(run))
        again = loader.indices(start).tolist()
        seen = _examples(own, loader.rows, stop - start, again)
        found[kind] = {"losses": losses, "examples": seen.tolist()}
    return found
