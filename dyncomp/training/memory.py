"""Memory of a compiled step: what XLA says and what the machine shows."""

import ctypes
import threading
from pathlib import Path
from typing import Any

import jax
import psutil

RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.002


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


class Peak:
    """The highest resident set of this process since this was made.

    Linux keeps the figure and can set it back; elsewhere, and in containers that forbid it, a thread samples.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.sampled = 0
        self.sampler: threading.Thread | None = None
        try:
            RESET.write_text("5")  # sets the kernel's peak back
        except OSError:
            self.sampler = threading.Thread(target=self._sample, daemon=True)
            self.sampler.start()

    def _sample(self) -> None:
        while not self.stop.wait(SAMPLE_SECONDS):
            self.sampled = max(self.sampled, resident_bytes())

    def bytes(self) -> int:
        """The peak so far; ends the sampling."""
        if self.sampler is not None:
            self.stop.set()
            self.sampler.join()
            return max(self.sampled, resident_bytes())
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


class Measured:
    """What a compiled step takes: XLA's figure, and the growth of this process or the device's peak.

    Make it after compiling and before the first step; the state is already resident then, so its bytes are added to
    the growth.
    """

    def __init__(self, compiled: Any, state: Any):
        self.xla = compiled_bytes(compiled)
        self.state = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.block_until_ready(state)))
        _return_freed()
        self.before, self.peak = resident_bytes(), Peak()

    def report(self) -> dict[str, int | None]:
        """``xla_bytes`` and ``measured_bytes``, both of one device (of this process where devices have no figure)."""
        grown = self.peak.bytes() - self.before + self.state
        device = device_peak_bytes()
        return {"xla_bytes": self.xla, "measured_bytes": grown if device is None else device}


def _return_freed() -> None:
    """Hands freed memory back to the system, so that the step cannot take it up again unseen (glibc only)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
