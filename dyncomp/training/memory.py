"""Memory of a compiled step: what XLA says and what the machine shows."""

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
