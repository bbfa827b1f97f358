"""Compiles the train step of a run for a machine that is not here.

The state is abstract (no array is made), so models larger than this machine compile too. The process needs
``JAX_PLATFORMS=cpu`` and ``TPU_SKIP_MDS_QUERY=1`` before jax starts (the command line sets both): otherwise libtpu
looks for a TPU.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dyncomp.core.aux import flatten
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import PyTree
from dyncomp.parallel import hlo, ops
from dyncomp.parallel.counts import bounds
from dyncomp.parallel.early import optimised
from dyncomp.parallel.memory import predict_memory
from dyncomp.parallel.mesh import MeshSpec, batch_parts, check_batch
from dyncomp.parallel.report import GIB, CompileReport, Memory
from dyncomp.parallel.roofline import chip_of
from dyncomp.parallel.roofline import seconds as op_seconds
from dyncomp.parallel.rules import make_rules, traced_for
from dyncomp.parallel.schedule import registers, schedules
from dyncomp.parallel.serving import Serving, lower, serving_bytes, serving_of
from dyncomp.parallel.shardings import held_bytes, logical_names, placed, shardings_for
from dyncomp.parallel.topology import Topology, compile_step, find

MARGIN = 1.25
"""How far over a device's memory our own count must be for a program not to be compiled."""

HEAVIEST = 10
"""Operations that a report names."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step and the shapes it takes.

    Attributes:
      step: (state, batch, seed) -> (state, metrics).
      state: abstract state, unboxed.
      boxed: abstract variables with the logical names of their axes.
      batch: abstract global batch.
      loss: (params, controls, batch, step, keys) -> (loss, rest): what the step differentiates.
      part: abstract batch that is differentiated at once, the whole one or one of those that are accumulated.
      trainable: regular expression of the parameters that move.
    """

    step: Callable[..., Any]
    state: PyTree
    boxed: PyTree
    batch: Mapping[str, jax.ShapeDtypeStruct]
    loss: Callable[..., Any]
    part: Mapping[str, jax.ShapeDtypeStruct]
    trainable: str = ".*"


@dataclasses.dataclass(frozen=True)
class Ask:
    """What to compile for which machine.

    Attributes:
      topology: such as ``v5e:2x2`` or ``cpu:4``.
      mesh: default the run's own, or all devices on the data axis.
      what: the train step, or a step of serving the run's language model (`dyncomp.parallel.serving`).
      batch, length: of serving; default the run's batch and the length of its inputs.
    """

    topology: str
    mesh: MeshSpec | None = None
    what: Literal["train", "prefill", "decode"] = "train"
    batch: int | None = None
    length: int | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """What is compiled, checked as far as that goes without compiling.

    Attributes:
      run: of a suite, one of its runs.
      ask: what was asked for.
      where: devices.
      mesh, rules: on them.
      made: the step.
      state_bytes: what a device holds before the step and after it: parameters and moments, or parameters and cache.
    """

    run: Any
    ask: Ask
    where: Topology
    mesh: Mesh
    rules: Mapping[str, Any]
    made: Program | Serving
    state_bytes: int


def prepare(run: Any, ask: Ask) -> Job:
    """Finds the machine, splits batch and parameters over it, and traces shapes; seconds, not minutes.

    Args:
      run: `dyncomp.training.Run` (of a `Suite`, the selected or first run); its ``program()`` gives the step.
      ask: what to compile.

    Raises:
      DyncompError: unknown topology, missing compiler, mesh or batch that does not fit the devices or the parameters,
        or no language model to serve.
    """
    if hasattr(run, "runs"):
        run = run.selected() or next(iter(run.runs.values()))
    if ask.what == "train" and (ask.batch or ask.length):
        raise DyncompError(
            "--batch and --length belong to --what prefill and decode; a train step has the config's"
        )
    spec = ask.mesh or run.mesh or MeshSpec()
    where = find(ask.topology)
    mesh, rules = spec.build(where.devices), make_rules(spec.rules)
    batch = ask.batch or run.batch_size
    check_batch(batch, mesh)
    if ask.what != "train":
        length = ask.length or run.task.spec()["inputs"].shape[0]
        made = serving_of(run, ask.what, batch, length)
        return Job(run, ask, where, mesh, rules, made, serving_bytes(made, mesh, rules))
    if run.accumulate > 1:
        check_batch(batch // run.accumulate, mesh)
    program = run.program()
    return Job(run, ask, where, mesh, rules, program, state_bytes(program, mesh, rules))


def compile_run(
    run: Any, topology: str, mesh: MeshSpec | None = None, **asked: Any
) -> CompileReport:
    """Compiles a step of a run for a topology: `prepare` and `compile_job`, with the arguments of `Ask`."""
    return compile_job(prepare(run, Ask(topology, mesh, **asked)))


def compile_job(job: Job) -> CompileReport:
    """Compiles, unless the state alone is more than a device holds."""
    if too_large := _too_large(job):
        return report_of(job, refused=too_large)
    start = time.perf_counter()
    compiled = _compiled(job)
    seconds = time.perf_counter() - start
    if isinstance(compiled, str):
        return report_of(job, refused=compiled, seconds=seconds)
    report = report_of(job, compiled.as_text(), _memory(compiled), seconds=seconds)
    counted = float((compiled.cost_analysis() or {}).get("flops", 0.0))
    return dataclasses.replace(report, xla_flops=counted)


def optimise_job(job: Job, folder: Path) -> CompileReport:
    """The same without machine code (`dyncomp.parallel.early`); the process must then end with `os._exit`.

    Args:
      job: what to compile.
      folder: of `early.dump_here`.
    """
    if too_large := _too_large(job):
        return report_of(job, refused=too_large)
    start = time.perf_counter()
    found = optimised(lambda: _compiled(job), folder)
    seconds = time.perf_counter() - start
    if isinstance(found, str):
        return report_of(job, refused=found, seconds=seconds)
    report = report_of(job, found.text, found.memory, seconds=seconds)
    return dataclasses.replace(report, stopped=True)


def with_kernels(report: CompileReport, folder: Path) -> CompileReport:
    """The report with what compilers wrote about its kernels (`dyncomp.parallel.schedule`)."""
    return dataclasses.replace(
        report, schedules=schedules(folder, report.kernels), registers=registers(folder)
    )


def _too_large(job: Job) -> str:
    """Why it is not worth compiling; empty where it may fit. Our own count of the whole may be wrong by `MARGIN`."""
    limit = job.where.memory
    if limit is None:
        return ""
    if job.state_bytes > limit:
        return f"the state alone takes {job.state_bytes / GIB:.1f} GiB a device; not compiled"
    needed = _predicted(job).get("peak", 0)
    if needed > MARGIN * limit:
        return f"about {needed / GIB:.1f} GiB a device, by our own count; not compiled"
    return ""


def _predicted(job: Job) -> dict[str, int]:
    if not isinstance(job.made, Program):
        return {}
    found = predict_memory(job.run.model, job.made, job.mesh, job.rules, held_of(job))
    return {**dataclasses.asdict(found), "peak": found.peak} if found else {}


def report_of(
    job: Job, text: str = "", memory: Memory | None = None, refused: str = "", seconds: float = 0.0
) -> CompileReport:
    """A report from a program's text and memory, or from the reason why there is none."""
    limit = job.where.memory
    found = ops.operations(text) if text else []
    chip = chip_of(job.ask.topology)
    longest = lambda each: op_seconds(each.work, chip) if chip else each.work.bytes
    report = CompileReport(
        what=job.ask.what,
        topology=job.ask.topology,
        mesh=dict(job.mesh.shape),
        devices=job.mesh.size,
        device_memory=limit,
        memory=memory,
        fits=None if limit is None else memory is not None and memory.peak <= limit,
        refused=refused,
        collectives=hlo.collectives(text) if text else {},
        kernels=hlo.kernels(text) if text else {},
        work=ops.by_kind(found),
        heaviest=sorted(found, key=longest, reverse=True)[:HEAVIEST],
        parameters=_parameters(job.made),
        batch=_shapes(job.made),
        state_bytes=job.state_bytes,
        seconds=seconds,
    )
    if isinstance(job.made, Program):
        ours, dense = _flops(job.run.model, job.made, job.mesh.size)
        report = dataclasses.replace(
            report, ledger_flops=ours, dense_flops=dense, predicted=_predicted(job)
        )
    return report


def held_of(job: Job) -> dict[str, int]:
    """What `memory.predict_memory` wants to know of a train step's arguments."""
    program, mesh = job.made, job.mesh
    assert isinstance(program, Program)
    names = logical_names(program.boxed)
    places = placed(names, program.state.params, mesh, job.rules)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(program.state.params),
        jax.tree.leaves(places),
        strict=True,
    )
    moving = layers = 0
    for (path, leaf), place in pairs:
        size = held_bytes(leaf, place)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        moving += size * bool(re.search(program.trainable, name))
        layers += size * ("/layers/" in name)
    batch = sum(leaf.size * leaf.dtype.itemsize for leaf in program.batch.values())
    return {
        "state": job.state_bytes,
        "moving": moving,
        "layers": layers,
        "batch": batch // batch_parts(mesh),
    }


def _parameters(made: Program | Serving) -> int:
    params = made.state.params if isinstance(made, Program) else made.variables["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _shapes(made: Program | Serving) -> dict[str, tuple[int, ...]]:
    if isinstance(made, Serving):
        return {"tokens": made.inputs}
    return {name: tuple(value.shape) for name, value in made.batch.items()}


def _compiled(job: Job) -> Any:
    """The compiled step, or XLA's one-line reason when it needs more memory than a device has."""
    with traced_for(job.mesh, job.rules):
        lowered = (
            _lower(job.made, job.mesh, job.rules)
            if isinstance(job.made, Program)
            else lower(job.made, job.mesh, job.rules)
        )
        try:
            return compile_step(lowered, job.mesh)
        except jax.errors.JaxRuntimeError as error:
            said = str(error).splitlines()[0][:300]
            if "RESOURCE_EXHAUSTED" not in said:
                fix = "; set experts.Exchange.ragged = False" if "Ragged all-to-all" in said else ""
                raise DyncompError(f"XLA: {said}{fix}") from error
            return said.partition("RESOURCE_EXHAUSTED: ")[2]


def _lower(program: Program, mesh: Mesh, rules: Mapping[str, Any]) -> jax.stages.Lowered:
    state, batch = shardings_for(program.boxed, program.state, mesh, rules)
    step = jax.jit(
        program.step,
        in_shardings=(state, batch, None),
        out_shardings=(state, None),
        donate_argnums=0,
    )
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    return step.lower(program.state, dict(program.batch), seed)


def state_bytes(program: Program, mesh: Mesh, rules: Mapping[str, Any]) -> int:
    """Bytes of the training state on one device: parameters, moments, averages.

    Raises:
      DyncompError: the mesh does not divide a parameter.
    """
    places, _ = shardings_for(program.boxed, program.state, mesh, rules)
    return held_bytes(program.state, places)


def _memory(compiled: Any) -> Memory:
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporaries, aliased = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    peak = getattr(stats, "peak_memory_in_bytes", 0)
    return Memory(
        arguments=arguments,
        outputs=outputs,
        temporaries=temporaries,
        aliased=aliased,
        code=stats.generated_code_size_in_bytes,
        peak=max(peak, arguments + outputs + temporaries - aliased),
    )


def _flops(model: Any, program: Program, devices: int) -> tuple[int | None, int | None]:
    """`CompileReport.ledger_flops` and ``dense_flops``; counts that depend on values are the most there is room for."""
    if not hasattr(model, "cost"):
        return None, None
    inputs = program.batch["inputs"]
    variables = {"params": program.state.params, "controls": program.state.controls}
    found = bounds(model, variables, inputs)
    prices = flatten(model.cost(inputs.shape))
    executed = {path: rows for path, rows in found.executed.items() if rows is not None}
    if len(executed) < len(found.executed):
        return None, None
    priced = lambda counts: 3 * sum(prices[path].flops * counts[path] for path in counts) // devices
    return priced(executed), priced({**executed, **found.every}) if found.every else None
