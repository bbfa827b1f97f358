"""A model of a step's time: three lower bounds from what was compiled and what makers publish about their chips.

It ranks meshes and says what binds; it has not been compared with a clock, so everything it prints is labelled so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from dyncomp.parallel.ops import Work
from dyncomp.parallel.report import CompileReport


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device, as published.

    Attributes:
      flops: bfloat16 FLOPs a second.
      memory: bytes a second from its memory.
      ring: bytes a second that it sends along one dimension of the torus, both directions together.
      clock: cycles a second, the peak over what the matrix units multiply a cycle; None where their size is not known.
    """

    flops: float
    memory: float
    ring: float
    clock: float | None = None


def _chip(
    flops: float,
    memory: float,
    links: float,
    dimensions: int,
    devices: int = 1,
    multipliers: int | None = None,
) -> Chip:
    """Peaks of a device out of those of a chip; ``links`` counts both directions of all its links."""
    sent = links / 2 / dimensions
    clock = flops / 2 / multipliers if multipliers else None
    return Chip(flops / devices, memory / devices, sent / devices, clock)


V4_FLOPS = 275e12
"""Of a v4 device that runs programs: the whole chip, where a described topology lists its two cores apart."""
CHIPS: Mapping[str, Chip] = {
    "v4": _chip(V4_FLOPS, 1.2e12, 0.6e12, 3, devices=2, multipliers=8 * 128**2),
    "v5e": _chip(197e12, 0.82e12, 0.4e12, 2, multipliers=4 * 128**2),
    "v5p": _chip(459e12, 2.77e12, 1.2e12, 3, multipliers=8 * 128**2),
    "v6e": _chip(918e12, 1.64e12, 0.8e12, 2, multipliers=4 * 256**2),
    "tpu7x": _chip(2307e12, 7.38e12, 1.2e12, 3, devices=2),
    "h100": _chip(989e12, 3.35e12, 0.9e12, 1),
}
"""By generation, from the pages of Google's Cloud TPU documentation and NVIDIA's data sheet (SXM, dense)."""

KINDS: Mapping[str, str] = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h100",  # the same peak; only its memory is faster
}
"""Generations by what JAX calls a device that runs programs."""

BETWEEN_NODES = 50e9
"""Bytes a second that a GPU sends to other nodes: a network card of 400 Gbit/s for each."""

ASSUMPTIONS = (
    "model, not measured: the longest of three bounds, if they overlap fully; their sum, if not at all. Compute: our "
    "FLOPs (executed at most, no recomputation; without such a count those of the compiled products) at the chip's "
    "bfloat16 peak. Memory: arguments and outputs once, "
    "temporaries twice, at the peak of its memory. Interconnect: what ring algorithms send for each collective, along "
    "one dimension of the torus (GPUs: through NVLink, or one network card of 400 Gbit/s a GPU between nodes), at its "
    "links' peak; no latency."
)


KINDS_NOTE = (
    "model, not measured: each operation takes the longer of its products at the chip's peak and its reads and writes "
    "at the memory's speed; collectives what a ring sends. Compiler: the cycles that XLA itself estimates, without "
    "kernels. Kinds overlap in part, so their sum is no step."
)

NO_MODEL = "no model of the time: the chip's peaks are not known"
"""What is said where `predict` has nothing to say."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds that a step takes at least.

    Attributes:
      compute, memory, interconnect: each alone.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def binds(self) -> Literal["compute", "memory", "interconnect"]:
        """The longest of the three."""
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))

    @property
    def overlapped(self) -> float:
        """Seconds of a step, if all three overlap fully."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def apart(self) -> float:
        """Seconds of a step, if nothing overlaps."""
        return self.compute + self.memory + self.interconnect


def chip_of(topology: str) -> Chip | None:
    """Peaks of the devices of a topology; None where they are not known."""
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip and name == "h100" and "x" in shape:
        return dataclasses.replace(chip, ring=BETWEEN_NODES)
    return chip


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOPs a second of a device that JAX calls ``device_kind``; None where they are not known."""
    if device_kind == "TPU v4":
        return V4_FLOPS
    return CHIPS[KINDS[device_kind]].flops if device_kind in KINDS else None


def predict(report: CompileReport) -> Prediction | None:
    """The model of a compiled step; None where it was refused or the chip's peaks are not known."""
    chip = chip_of(report.topology)
    if chip is None or report.memory is None:
        return None
    flops = report.ledger_flops
    if flops is None:
        flops = sum(work.flops for work in report.work.values())
    touched = report.memory.arguments + report.memory.outputs + 2 * report.memory.temporaries
    sent = sum(traffic.sent for traffic in report.collectives.values())
    return Prediction(flops / chip.flops, touched / chip.memory, sent / chip.ring)


def said(report: CompileReport) -> str:
    """What binds and for how long, as one line; empty where there is no model."""
    found = predict(report)
    if found is None:
        return ""
    shortest, longest = found.overlapped * 1e3, found.apart * 1e3
    return f"{found.binds} binds: {shortest:.2f} to {longest:.2f} ms a step (model)"


def seconds(work: Work, chip: Chip) -> float:
    """The longer of multiplying at the peak and moving at the memory's speed."""
    return max(work.flops / chip.flops, work.bytes / chip.memory)


@dataclasses.dataclass(frozen=True)
class Share:
    """What operations of one kind take in a step, at least.

    Attributes:
      seconds: by the model.
      binds: "compute", "memory" or "interconnect".
      compiler: seconds by the cycles that the compiler estimates; None where it does not.
    """

    seconds: float
    binds: str
    compiler: float | None


def shares(report: CompileReport) -> dict[str, Share]:
    """By kind of operation and of collective, longest first; empty where there is no model."""
    chip = chip_of(report.topology)
    if chip is None or report.memory is None:
        return {}
    found = {}
    for kind, work in report.work.items():
        bound = "compute" if work.flops / chip.flops > work.bytes / chip.memory else "memory"
        estimate = work.cycles / chip.clock if chip.clock and work.cycles else None
        found[kind] = Share(seconds(work, chip), bound, estimate)
    for kind, traffic in report.collectives.items():
        found[kind] = Share(traffic.sent / chip.ring, "interconnect", None)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))
