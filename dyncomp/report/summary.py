"""The figures of a run that a reader wants first, out of its summary.json."""

from collections.abc import Mapping
from typing import Any

from dyncomp.report.load import mapping, number


def figures_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Quality (the headline metric first), compute, size, time and memory by name; what is missing is left out.

    Args:
      summary: content of summary.json, or what `dyncomp eval` returns; may be damaged.
    """
    quality, headline = mapping(summary.get("quality")), summary.get("headline")
    compute, memory, timings = (mapping(summary.get(k)) for k in ("compute", "memory", "timings"))
    found = {
        **{name: value for name, value in quality.items() if name == headline},
        **quality,
        "needed FLOPs": compute.get("flops_needed"),
        "executed FLOPs": compute.get("flops_executed"),
        "active experts": _active_experts(compute),
        "parameters": summary.get("parameters"),
        "seconds per step": timings.get("seconds_per_step"),
        "MFU": timings.get("mfu"),
        "compile seconds": _total(timings.get("compile_seconds")),
        "memory, XLA (MiB)": _mebibytes(memory.get("xla_bytes")),
        "memory, measured (MiB)": _mebibytes(memory.get("measured_bytes")),
    }
    return {name: value for name, value in found.items() if number(value) is not None}


def cell(value: Any) -> str:
    """A value as text: whole numbers in groups of three, others with four significant digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _active_experts(compute: Mapping[str, Any]) -> float | None:
    from dyncomp.training.evaluate import experts_per_row

    events = mapping(compute.get("events_per_element"))
    sound = {path: value for path, value in events.items() if number(value) is not None}
    return experts_per_row({"events_per_element": sound})


def _total(seconds: Any) -> float | None:
    """The sum over a run's stages; None for one that compiled nothing (it had finished before)."""
    found = [number(value) for value in seconds] if isinstance(seconds, list) else []
    return sum(value for value in found if value is not None) or None


def _mebibytes(value: Any) -> float | None:
    found = number(value)
    return None if found is None else found / 2**20
