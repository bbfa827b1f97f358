"""What the figures of an experiment depend on, read without starting an accelerator."""

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("dyncomp", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def git(folder: Path, *words: str) -> bytes | None:
    """Output of a git command in ``folder``; None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def environment(folder: Path) -> dict[str, Any]:
    """Versions, processor, threads of a seed, date, and git revision of the repository around ``folder``."""
    revision = git(folder, "rev-parse", "HEAD")
    changed = git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "threads": 1,
        "date": time.strftime("%Y-%m-%d"),
        "revision": revision.decode().strip() if revision else None,
        "dirty": bool(changed),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
