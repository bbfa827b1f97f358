"""What an ahead-of-time compile tells, as a table and as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dyncomp.parallel.hlo import Traffic
from dyncomp.parallel.ops import Operation, Work
from dyncomp.parallel.schedule import Registers, Schedule

GIB = 2**30
CAVEAT = (
    "XLA counts the body of a scanned loop once and a kernel without a cost estimate as nothing; "
    "ours counts every layer, from the ledger's prices of the events the step executes at most."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device, by XLA's accounts.

    Attributes:
      arguments, outputs, temporaries: as named; ``aliased`` is the part of the outputs that reuses arguments.
      code: generated program.
      peak: XLA's high-water mark where it gives one, else arguments + outputs + temporaries - aliased.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileReport:
    """A compiled step.

    Attributes:
      what: "train", "prefill" or "decode".
      topology: what it was compiled for.
      mesh: devices per axis.
      devices: how many.
      device_memory: bytes of one device; None where there is no fixed limit.
      memory: bytes needed on one device; None when XLA refused the program for want of memory.
      fits: whether it fits; None without a limit.
      refused: XLA's words when it does not fit.
      xla_flops: of one device and step, by XLA (loops once); None if refused.
      ledger_flops: of one device and train step, forward and backward without recomputation, by our prices; None where
        prices need counts.
      dense_flops: the same if every expert ran on every token; None without experts.
      work: by kind of operation.
      heaviest: those that take longest by the model (read most, where there is none).
      collectives: by kind.
      kernels: calls of hand-written kernels in the program, by name.
      parameters: scalars in the model.
      batch: shapes of the global batch.
      state_bytes: what a device holds before and after the step, by our own count.
      seconds: spent tracing and compiling.
      predicted: bytes on one device by our own count (`dyncomp.parallel.memory`): its parts, and ``peak``; empty for
        steps that it does not know.
      schedules: of hand-written kernels on a TPU, where asked for.
      registers: of kernels on a GPU, where asked for.
      stopped: before machine code was written (`dyncomp.parallel.early`).
    """

    topology: str
    mesh: dict[str, int]
    devices: int
    device_memory: int | None
    memory: Memory | None
    fits: bool | None
    what: str = "train"
    refused: str = ""
    xla_flops: float | None = None
    ledger_flops: int | None = None
    dense_flops: int | None = None
    work: dict[str, Work] = dataclasses.field(default_factory=dict)
    heaviest: Sequence[Operation] = ()
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    batch: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    state_bytes: int = 0
    seconds: float = 0.0
    stopped: bool = False
    predicted: dict[str, int] = dataclasses.field(default_factory=dict)
    schedules: dict[str, Schedule] = dataclasses.field(default_factory=dict)
    registers: dict[str, Registers] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """All fields and the verdict, as JSON text."""
        return json.dumps({**dataclasses.asdict(self), "verdict": self.verdict()}, indent=1)

    def verdict(self) -> str:
        """One line: fits or not, and by how much."""
        if self.memory is None:
            return f"does not fit: {self.refused}"
        used = f"{self.memory.peak / GIB:.2f} GiB"
        if self.device_memory is None:
            return f"compiled; {used} a device"
        word = "fits" if self.fits else "does not fit"
        return f"{word}: {used} of {self.device_memory / GIB:.0f} GiB a device"

    def table(self) -> Any:
        """A renderable for rich."""
        grid = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for key, value in self._rows():
            grid.add_row(key, value)
        style = "bold red" if self.fits is False else "bold green"
        return Group(grid, Text(self.verdict(), style=style), Text(CAVEAT, style="dim"))

    def _rows(self) -> list[tuple[str, str]]:
        mesh = " x ".join(f"{axis}={n}" for axis, n in self.mesh.items() if n > 1) or "1 device"
        rows = [("topology", f"{self.topology} ({self.devices} devices, {mesh})")]
        rows.append(("parameters", f"{self.parameters:,}"))
        rows.append(("global batch", ", ".join(f"{k} {list(s)}" for k, s in self.batch.items())))
        if self.memory:
            for name, size in dataclasses.asdict(self.memory).items():
                rows.append((f"{name} a device", f"{size / GIB:.3f} GiB"))
        if self.predicted:
            rows.append(("peak a device (ours)", f"{self.predicted['peak'] / GIB:.3f} GiB"))
        rows.append(("state a device (ours)", f"{self.state_bytes / GIB:.3f} GiB"))
        if self.xla_flops is not None:
            rows.append(("FLOPs a device (XLA)", f"{self.xla_flops:.3e}"))
        if self.ledger_flops is not None:
            rows.append(("FLOPs a device (ours, at most)", f"{self.ledger_flops:.3e}"))
        for kind, t in self.collectives.items():
            rows.append((kind, f"{t.sites} places, {t.runs} runs, {t.bytes / GIB:.3f} GiB a step"))
        for name, count in self.kernels.items():
            rows.append((f"kernel {name}", f"{count} places{self._scheduled(name)}"))
        rows += self._spilled()
        how = "optimised, no machine code, in" if self.stopped else "compiled in"
        rows.append((how, f"{self.seconds:.1f} s"))
        return rows

    def _scheduled(self, kernel: str) -> str:
        if (found := self.schedules.get(kernel)) is None:
            return ""
        return (
            f"; busiest stretch {found.bundles} of {found.total} bundles, matrix units {found.matrix:.0%} full, "
            f"{found.spills} spills, {found.fills} fills"
        )

    def _spilled(self) -> list[tuple[str, str]]:
        if not self.registers:
            return []
        bad = {n: r for n, r in self.registers.items() if r.spill_stores or r.spill_loads}
        worst = sorted(bad.items(), key=lambda item: -item[1].spill_stores)[:5]
        said = ", ".join(f"{name} {r.spill_stores} B" for name, r in worst)
        return [("kernels that spill", f"{len(bad)} of {len(self.registers)} {said}")]
