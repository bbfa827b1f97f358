"""Measuring in a fresh process: nothing compiled or allocated before, and, when asked, one pinned thread."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.core.heap import keep_freed_memory
from dyncomp.evidence.seed import PINNED

MARK = "dyncomp-result "
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
PLAIN_ERRORS = {"JAX_TRACEBACK_FILTERING": "off"}
"""So that the last line is the error's, not a remark about frames."""


def call(target: str, arguments: Mapping[str, Any], *, pinned: bool = False) -> Any:
    """Calls ``module:function`` with keyword arguments in a new process and returns its JSON result.

    JAX's compile cache is off there.

    Args:
      target: of this library, such as "dyncomp.bench.compile:compile_seconds".
      arguments: JSON-ready.
      pinned: one thread on one core, as evidence runs; else the cores of this process.

    Raises:
      DyncompError: the process failed; the message ends with its last line.
    """
    words = [sys.executable, "-m", __name__, target, json.dumps(dict(arguments))]
    env = {**os.environ, **NO_CACHE, **PLAIN_ERRORS, **(PINNED if pinned else {})}
    done = subprocess.run([*words, *["--pinned"][: int(pinned)]], env=env, capture_output=True)
    lines = done.stdout.decode(errors="replace").splitlines()
    found = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    if done.returncode or not found:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise DyncompError(f"{target} failed in a process of its own: {said[-1]}")
    return json.loads(found[-1])


def main(argv: list[str]) -> int:
    """Runs one call and prints its result."""
    if "--pinned" in argv and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep_freed_memory()
    module, name = argv[0].split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(argv[1]))
    print(MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
