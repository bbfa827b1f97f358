"""Measuring in a fresh process: nothing compiled or allocated before, and, when asked, one pinned thread."""

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.core.heap import keep_freed_memory
from dyncomp.core.loopback import free_address
from dyncomp.evidence.seed import PINNED

MARK = "dyncomp-result "
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
PLAIN_ERRORS = {"JAX_TRACEBACK_FILTERING": "off"}
"""So that the last line is the error's, not a remark about frames."""


def call(
    target: str,
    arguments: Mapping[str, Any],
    *,
    pinned: bool = False,
    environment: Mapping[str, str] = types.MappingProxyType({}),
) -> Any:
    """Calls ``module:function`` with keyword arguments in a new process and returns its JSON result.

    JAX's compile cache is off there.

    Args:
      target: of this library, such as "dyncomp.bench.compile:compile_seconds".
      arguments: JSON-ready.
      pinned: one thread on one core, as evidence runs; else the cores of this process.
      environment: added to that of this process.

    Raises:
      DyncompError: the process failed; the message ends with its last line.
    """
    env = {**os.environ, **NO_CACHE, **PLAIN_ERRORS, **(PINNED if pinned else {}), **environment}
    words = _words(target, arguments, *["--pinned"][: int(pinned)])
    done = subprocess.run(words, env=env, capture_output=True)
    return _result(target, done.returncode, done.stdout, done.stderr)


def together(
    target: str,
    arguments: Mapping[str, Any],
    *,
    processes: int,
    environment: Mapping[str, str],
) -> Any:
    """`call` in several processes at once, which also get ``coordinator``, ``processes`` and ``process``.

    Args:
      environment: added to that of each.

    Returns:
      What the first returned.

    Raises:
      DyncompError: one of them failed.
    """
    env, address = {**os.environ, **NO_CACHE, **PLAIN_ERRORS, **environment}, free_address()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = []
    try:
        for index in range(processes):
            place = {"coordinator": address, "processes": processes, "process": index}
            words = _words(target, {**arguments, **place})
            started.append(subprocess.Popen(words, env=env, **pipes))
        with ThreadPoolExecutor(processes) as waiting:
            said = list(waiting.map(lambda process: process.communicate(), started))
    finally:
        for process in started:
            process.kill()
    failed = next((n for n, process in enumerate(started) if process.returncode > 0), 0)
    return _result(target, started[failed].returncode, *said[failed])


def _words(target: str, arguments: Mapping[str, Any], *flags: str) -> list[str]:
    return [sys.executable, "-m", __name__, target, json.dumps(dict(arguments)), *flags]


def _result(target: str, code: int, out: bytes, err: bytes) -> Any:
    lines = out.decode(errors="replace").splitlines()
    found = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    if code or not found:
        said = err.decode(errors="replace").strip().splitlines() or ["no message"]
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
