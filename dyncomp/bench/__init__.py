"""`dyncomp bench NAME`: speed and truth of the ledger, measured; never asserted in a test."""

import argparse
import importlib
import json as jsonlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.core.lock import measuring

BENCHES = {
    "ledger": "dyncomp.bench.ledger",
    "overhead": "dyncomp.bench.overhead",
    "kills": "dyncomp.bench.kills",
    "exits": "dyncomp.bench.exits",
    "experts": "dyncomp.bench.experts",
}
"""Name -> module with ``rows(quick: bool) -> list[dict]``, imported when asked for."""

COLUMNS = ("id", "ratio", "interval", "goal", "relation", "holds")


def environment() -> dict[str, Any]:
    """What a figure depends on: versions, processor, threads, date, revision."""
    packages = ("dyncomp", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: _version(name) for name in packages}
    return {
        "python": platform.python_version(),
        "versions": versions,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "date": time.strftime("%Y-%m-%d"),
        "revision": _revision(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _revision() -> str | None:
    """The git revision of the source tree, with + where it was changed; None outside a repository."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        revision = git("rev-parse", "HEAD")
    except FileNotFoundError:
        return None
    return revision and revision + ("+" if git("status", "--porcelain", "-uno") else "")


def measure(name: str, *, quick: bool = False) -> dict[str, Any]:
    """Runs a bench under the machine's lock.

    Raises:
      DyncompError: there is no such bench, or something else is being measured.
    """
    if name not in BENCHES:
        raise DyncompError(f"no bench {name!r}; there are {', '.join(sorted(BENCHES))}")
    try:
        module = importlib.import_module(BENCHES[name])
    except ModuleNotFoundError as error:
        if error.name != BENCHES[name]:
            raise
        raise DyncompError(f"bench {name!r} is not part of this version") from None
    with measuring(f"bench {name}"):
        rows = module.rows(quick)
    return {"bench": name, "quick": quick, "environment": environment(), "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Prints a table, and the rule or reference of each row below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, title=f"bench {result['bench']}{' (quick)' * result['quick']}")
    for row in result["rows"]:
        table.add_row(*(_text(row.get(column)) for column in COLUMNS))
    console = Console()
    console.print(table)
    for row in result["rows"]:
        console.print(f"{row['id']}: {row['reference']}", highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_text, value)) + "]"
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def main(name: str, argv: Sequence[str] = (), json: bool = False) -> int:
    """Runs bench ``name`` with ``argv`` (``--quick``) and prints a table or JSON; 0 when it ran."""
    parser = argparse.ArgumentParser(prog=f"dyncomp bench {name}")
    parser.add_argument("--quick", action="store_true", help="a smoke run, never evidence")
    result = measure(name, quick=parser.parse_args(list(argv)).quick)
    if json:
        jsonlib.dump(result, sys.stdout, indent=1)
        print()
    else:
        show(result)
    return 0
