"""A model of a step's time: three lower bounds from what was compiled and what makers publish about their chips.

It ranks meshes and says what binds; it has not been compared with a clock, so everything it prints is labelled so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from dyncomp.parallel.report import CompileReport


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one device, as published.

    Attributes:
      flops: bfloat16 FLOPs a second.
      memory: bytes a second from its memory.
      ring: bytes a second that it sends along one dimension of the torus, both directions together.
    """

    flops: float
    memory: float
    ring: float


def _chip(flops: float, memory: float, links: float, dimensions: int, devices: int = 1) -> Chip:
    """Peaks of a device out of those of a chip; ``links`` counts both directions of all its links."""
    sent = links / 2 / dimensions
    return Chip(flops / devices, memory / devices, sent / devices)


CHIPS: Mapping[str, Chip] = {
    "v4": _chip(275e12, 1.2e12, 0.6e12, 3, devices=2),
    "v5e": _chip(197e12, 0.82e12, 0.4e12, 2),
    "v5p": _chip(459e12, 2.77e12, 1.2e12, 3),
    "v6e": _chip(918e12, 1.64e12, 0.8e12, 2),
    "tpu7x": _chip(2307e12, 7.38e12, 1.2e12, 3, devices=2),
}
"""By generation, from the pages of Google's Cloud TPU documentation."""

ASSUMPTIONS = (
    "model, not measured: the longest of three bounds, if they overlap fully; their sum, if not at all. Compute: our "
    "FLOPs (executed at most, no recomputation) at the chip's bfloat16 peak. Memory: arguments and outputs once, "
    "temporaries twice, at the peak of its memory. Interconnect: what ring algorithms send for each collective, along "
    "one dimension of the torus, at its links' peak; no latency."
)


NO_MODEL = "no model of the time: the work of a step is known only when it runs, or the chip's peaks are not known"
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


def predict(report: CompileReport) -> Prediction | None:
    """The model of a compiled step; None where it was refused, has no prices or the chip's peaks are not known."""
    chip = CHIPS.get(report.topology.partition(":")[0])
    if chip is None or report.memory is None or report.ledger_flops is None:
        return None
    touched = report.memory.arguments + report.memory.outputs + 2 * report.memory.temporaries
    sent = sum(traffic.sent for traffic in report.collectives.values())
    return Prediction(report.ledger_flops / chip.flops, touched / chip.memory, sent / chip.ring)


def said(report: CompileReport) -> str:
    """What binds and for how long, as one line; empty where there is no model."""
    found = predict(report)
    if found is None:
        return ""
    shortest, longest = found.overlapped * 1e3, found.apart * 1e3
    return f"{found.binds} binds: {shortest:.2f} to {longest:.2f} ms a step (model)"
