"""What a figure depends on: versions, processor, threads, date, git revision; and devices where asked."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

NUMERIC = (
    *("dyncomp", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("datasets", "grain"),
)
"""Packages that can change the numbers of a training run."""

PACKAGES = (*NUMERIC, "scipy", "scikit-learn")
CHANGES = ("devices", "platform", "cpu_threads", "processes")
"""Entries of `run_environment`, beside the versions, that can change numbers."""


def environment(folder: Path | None = None, *, threads: int | str | None = None) -> dict[str, Any]:
    """Versions, processor, cores, threads, date and git revision, JSON-ready; starts no accelerator.

    Args:
      folder: inside the git repository that is meant; default, the one this package runs from.
      threads: that computed the figures; default, what ``OMP_NUM_THREADS`` says (None: as many as cores).
    """
    name, dirty = revision(folder)
    return {
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "cpu": processor(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS") if threads is None else threads,
        "date": time.strftime("%Y-%m-%d"),
        "revision": name,
        "dirty": dirty,
    }


def run_environment() -> dict[str, Any]:
    """What a training run depends on beside its config, JSON-ready; starts JAX's default backend."""
    import jax

    name, dirty = revision()
    return {
        "python": platform.python_version(),
        "packages": versions(NUMERIC),
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "cpu": processor(),
        "cpu_threads": cores(),
        "revision": name or "",
        "dirty": dirty,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two `run_environment` and can change numbers, a line each.

    A package that only one of the two names is no difference: it was not recorded.
    """
    say = lambda name, then, today: f"{name}: {then} then, {today} now"
    changed = [k for k in CHANGES if before.get(k) != now.get(k)]
    lines = [say(name, before.get(name), now.get(name)) for name in changed]
    old, new = before.get("packages") or {}, now.get("packages") or {}
    both = [name for name in new if name in old and old[name] != new[name]]
    return lines + [say(name, old[name], new[name]) for name in both]


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions; None for a package that is not there."""
    return {name: _version(name) for name in packages}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Model name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def git(folder: Path, *words: str) -> bytes | None:
    """Output of a git command in ``folder``; None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def revision(folder: Path | None = None) -> tuple[str | None, bool]:
    """(git revision, whether tracked files were changed) around ``folder``; (None, False) outside a repository."""
    folder = folder or Path(__file__).parent
    head = git(folder, "rev-parse", "HEAD")
    changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    return (head.decode().strip() if head else None), bool(head and changed)
