"""Compiles the train step of a run for a machine that is not here.

The state is abstract (no array is made), so models larger than this machine compile too. The process needs
``JAX_PLATFORMS=cpu`` and ``TPU_SKIP_MDS_QUERY=1`` before jax starts (the command line sets both): otherwise libtpu
looks for a TPU.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dyncomp.core.aux import flatten
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import PyTree
from dyncomp.parallel import hlo
from dyncomp.parallel.counts import executed_at_most
from dyncomp.parallel.mesh import MeshSpec, check_batch
from dyncomp.parallel.report import CompileReport, Memory
from dyncomp.parallel.rules import make_rules, use
from dyncomp.parallel.shardings import shardings_for
from dyncomp.parallel.topology import compile_step, find


@dataclasses.dataclass(frozen=True)
class Program:
    """A train step and the shapes it takes.

    Attributes:
      step: (state, batch, seed) -> (state, metrics).
      state: abstract state, unboxed.
      boxed: abstract variables with the logical names of their axes.
      batch: abstract global batch.
    """

    step: Callable[..., Any]
    state: PyTree
    boxed: PyTree
    batch: Mapping[str, jax.ShapeDtypeStruct]


def compile_run(run: Any, topology: str, mesh: MeshSpec | None = None) -> CompileReport:
    """Compiles a run's full train step for a topology.

    Args:
      run: `dyncomp.training.Run` (of a `Suite`, the selected or first run); its ``program()`` gives the step.
      topology: such as ``v5e:2x2`` or ``cpu:4``.
      mesh: default the run's own, or all devices on the data axis.

    Raises:
      DyncompError: unknown topology, missing compiler, mesh or batch that does not fit the devices.
    """
    if hasattr(run, "runs"):
        run = run.selected() or next(iter(run.runs.values()))
    spec = mesh or run.mesh or MeshSpec()
    where = find(topology)
    built = spec.build(where.devices)
    check_batch(run.batch_size, built)
    if run.accumulate > 1:
        check_batch(run.batch_size // run.accumulate, built)
    program = run.program()
    start = time.perf_counter()
    compiled = compile_program(program, built, make_rules(spec.rules))
    seconds = time.perf_counter() - start
    memory = None if isinstance(compiled, str) else _memory(compiled)
    limit = where.memory
    report = CompileReport(
        topology=topology,
        mesh=dict(built.shape),
        devices=built.size,
        device_memory=limit,
        memory=memory,
        fits=None if limit is None else memory is not None and memory.peak <= limit,
        refused=compiled if isinstance(compiled, str) else "",
        ledger_flops=ledger_flops(run, program, built.size),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(program.state.params)),
        batch={name: tuple(value.shape) for name, value in program.batch.items()},
        seconds=seconds,
    )
    return report if isinstance(compiled, str) else _with_program(report, compiled)


def _with_program(report: CompileReport, compiled: Any) -> CompileReport:
    text = compiled.as_text()
    return dataclasses.replace(
        report,
        xla_flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)),
        collectives=hlo.collectives(text),
        kernels=hlo.kernels(text),
    )


def compile_program(program: Program, mesh: Mesh, rules: Mapping[str, Any]) -> Any:
    """The compiled step, or XLA's one-line reason when it needs more memory than a device has."""
    with use(mesh, rules):
        state, batch = shardings_for(program.boxed, program.state, mesh, rules)
        step = jax.jit(
            program.step,
            in_shardings=(state, batch, None),
            out_shardings=(state, None),
            donate_argnums=0,
        )
        seed = jax.ShapeDtypeStruct((), jnp.int32)
        lowered = step.lower(program.state, dict(program.batch), seed)
        try:
            return compile_step(lowered, mesh)
        except jax.errors.JaxRuntimeError as error:
            said = str(error).splitlines()[0][:300]
            if "RESOURCE_EXHAUSTED" not in said:
                fix = "; set experts.Exchange.ragged = False" if "Ragged all-to-all" in said else ""
                raise DyncompError(f"XLA: {said}{fix}") from error
            return said.partition("RESOURCE_EXHAUSTED: ")[2]


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


def ledger_flops(run: Any, program: Program, devices: int) -> int | None:
    """FLOPs of one step on one device by the model's prices: three times the forward pass, without recomputation.

    Counts that depend on values are taken at the most that the plan has room for; None when an event has no bound
    or the model no prices.
    """
    if not hasattr(run.model, "cost"):
        return None
    inputs = program.batch["inputs"]
    variables = {"params": program.state.params, "controls": program.state.controls}
    counts = executed_at_most(run.model, variables, inputs)
    prices = flatten(run.model.cost(inputs.shape))
    if any(counts[path] is None for path in counts):
        return None
    return 3 * sum(prices[path].flops * (counts[path] or 0) for path in counts) // devices
