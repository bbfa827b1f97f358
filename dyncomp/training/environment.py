"""What a run depends on beside its config: versions, devices, threads."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "datasets", "grain")
NUMERIC = ("devices", "platform", "cpu_threads", "processes", "packages")
"""Entries that can change numbers, so that a resumed run warns when they differ."""


def cpu_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions, devices and threads; JSON-ready."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": cpu_threads(),
        "revision": revision(),
    }


def revision() -> str:
    """Git revision of the checkout this package runs from, or "" outside one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two environments and can change numbers."""
    return [
        f"{k}: {before.get(k)} then, {now.get(k)} now"
        for k in NUMERIC
        if before.get(k) != now.get(k)
    ]
