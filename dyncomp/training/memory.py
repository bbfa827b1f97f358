"""Memory of a compiled step: what XLA says and what the machine shows."""

from pathlib import Path
from typing import Any

import jax
import psutil


def compiled_bytes(compiled: Any) -> int:
    """Arguments + outputs + temporaries - aliased, in bytes, of one device."""
    stats = compiled.memory_analysis()
    if stats is None:
        return 0
    live = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return live - stats.alias_size_in_bytes


def resident_bytes() -> int:
    """Resident set of this process."""
    return psutil.Process().memory_info().rss


def device_peak_bytes() -> int | None:
    """Peak bytes in use on the first device, where the runtime tells (not on CPUs)."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


class Measured:
    """What a compiled step takes: XLA's figure, and the growth of this process or the device's peak.

    Make it after compiling and before the first step; the state is already resident then, so its bytes are added to
    the growth.
    """

    def __init__(self, compiled: Any, state: Any):
        self.xla = compiled_bytes(compiled)
        self.state = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's peak back
            self.before: int | None = resident_bytes()
        except OSError:
            self.before = None

    def report(self) -> dict[str, int | None]:
        """``xla_bytes`` of one device; ``measured_bytes``, None where the system has no such figure."""
        peak = device_peak_bytes()
        if peak is None and self.before is not None:
            lines = Path("/proc/self/status").read_text().splitlines()
            peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
            peak = peaks[0] - self.before + self.state if peaks else None
        return {"xla_bytes": self.xla, "measured_bytes": peak}
