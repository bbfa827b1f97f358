"""Which mesh of a machine: those worth compiling, and the order of what was compiled."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.models import DecoderLM
from dyncomp.parallel.aot import Program, compile_run, state_bytes
from dyncomp.parallel.mesh import AXES, BATCH_AXES, MeshSpec
from dyncomp.parallel.report import GIB, CompileReport
from dyncomp.parallel.roofline import predict
from dyncomp.parallel.rules import make_rules
from dyncomp.parallel.topology import Topology


def candidates(run: Any, where: Topology) -> list[MeshSpec]:
    """Meshes that divide the batch and every parameter, on which a device holds its part of the state; likeliest first.

    The fewer parts a matrix product is split into, the likelier: a tensor axis sends activations in every layer. The
    sequence is split only where there are fewer sequences than devices.

    Args:
      run: `dyncomp.training.Run`.
      where: devices, and the memory of one.

    Raises:
      DyncompError: there is none; says what stood in the way of one.
    """
    program = run.program()
    rules = run.mesh.rules if run.mesh else None
    batch = run.batch_size // run.accumulate
    found, reason = [], f"none divides a batch of {batch}"
    length = _length(run, program) if batch < len(where.devices) else 1
    for sizes in meshes(len(where.devices), batch, _has_experts(program), length):
        spec = MeshSpec(**sizes, rules=rules)
        try:
            held = state_bytes(program, spec.build(where.devices), make_rules(spec.rules))
        except DyncompError as error:
            reason = str(error)
            continue
        if where.memory is None or held <= where.memory:
            found.append(spec)
        else:
            reason = f"the state alone takes {held / GIB:.0f} GiB a device"
    if not found:
        raise DyncompError(f"no mesh of {where.name} will do: {reason}")
    return sorted(found, key=lambda spec: (spec.tensor, spec.sequence, spec.expert, spec.fsdp))


def within(
    run: Any, topology: str, specs: Iterable[MeshSpec], minutes: float | None
) -> tuple[list[CompileReport], int]:
    """Reports of the meshes whose compile began within a time, and how many others there were.

    Args:
      run: `dyncomp.training.Run`.
      topology: to compile for.
      specs: in the order of trying.
      minutes: None for no end; the first mesh is compiled in any case.
    """
    start, made, left = time.perf_counter(), [], 0
    for spec in specs:
        late = minutes is not None and time.perf_counter() - start > 60 * minutes
        if made and late:
            left += 1
        else:
            made.append(compile_run(run, topology, spec))
    return made, left


def meshes(devices: int, batch: int, experts: bool, length: int = 1) -> Iterator[dict[str, int]]:
    """Every split of ``devices`` over axes that divide the batch and the length; the expert axis only if asked for."""
    for sizes in _factors(devices, AXES):
        parts = math.prod(sizes[axis] for axis in BATCH_AXES)
        split = batch % parts == 0 and length % sizes["sequence"] == 0
        if split and (experts or sizes["expert"] == 1):
            yield sizes


def _factors(number: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Every way to write a number as a product of one factor an axis."""
    if len(axes) == 1:
        yield {axes[0]: number}
        return
    for size in (size for size in range(1, number + 1) if number % size == 0):
        yield from ({axes[0]: size, **rest} for rest in _factors(number // size, axes[1:]))


def _length(run: Any, program: Program) -> int:
    """Positions of a language model's sequence; 1 of what reads no tokens, whose positions the batch does not tell."""
    return program.batch["inputs"].shape[1] if isinstance(run.model, DecoderLM) else 1


def _has_experts(program: Program) -> bool:
    is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
    leaves = jax.tree.leaves(program.boxed, is_leaf=is_box)
    return any("expert" in leaf.names for leaf in leaves if is_box(leaf))


def ranked(reports: Sequence[CompileReport]) -> list[CompileReport]:
    """Best first: those that fit, by predicted time; then the others."""

    def key(report: CompileReport) -> tuple[bool, float, float]:
        found = predict(report)
        times = (found.overlapped, found.apart) if found else (math.inf, math.inf)
        return (report.fits is False, *times)

    return sorted(reports, key=key)
