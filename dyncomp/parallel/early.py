"""A compile that is stopped once XLA has optimised the program and placed its buffers, before it writes machine code.

On TPUs machine code is most of a compile's time, and nothing of it is needed to know memory, collectives, kernels and
products: they are final by then. Whether kernels become code is not learnt. The compile runs in a process of its own,
which XLA tells to dump what it has; that process is ended when the dump is whole.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dyncomp.core.errors import DyncompError
from dyncomp.parallel.report import Memory

TEXT = "after_optimizations_after_buffer_assignment.txt"
BUFFERS = "after_optimizations-buffer-assignment.txt"
"""Ends of the names of what XLA dumps; the first is written last."""

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*?):?$", re.M)
_STEP = re.compile(r"\.jit_(step|prefill|decode)\.")
"""Names of the steps; other programs are compiled on the way."""

POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Optimised:
    """What a stopped compile left.

    Attributes:
      text: the optimised program.
      memory: of one device.
      refused: XLA's words when it needs more memory than a device has; then there is no text.
      seconds: from the start of the process.
    """

    text: str
    memory: Memory | None
    refused: str
    seconds: float


def optimised(words: Sequence[str]) -> Optimised:
    """Runs ``dyncomp compile`` until its program is optimised.

    Args:
      words: arguments behind ``compile``, of one config and one mesh.

    Raises:
      DyncompError: the command's own error.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        told = {**os.environ, "XLA_FLAGS": flags + " --xla_dump_hlo_module_re=jit_(step|prefill|decode)"}
        command = [sys.executable, "-m", "dyncomp", "compile", *words, "--json"]
        with (Path(folder) / "said").open("w+") as said, (Path(folder) / "err").open("w+") as wrong:
            child = subprocess.Popen(command, env=told, stdout=said, stderr=wrong)
            try:
                found = _wait(child, Path(folder))
            finally:
                child.kill()
                child.wait()
            seconds = time.perf_counter() - start
            if found is not None:
                text, memory = _read(found)
                return Optimised(text, memory, "", seconds)
            return _ended(child.returncode, said, wrong, seconds)


def _wait(child: subprocess.Popen, folder: Path) -> Path | None:
    """Path of the dump's files without their ends, or None where the process ended without them."""
    while True:
        alive = child.poll() is None
        steps = [path for path in folder.glob(f"*{TEXT}") if _STEP.search(path.name)]
        if steps:
            name = str(steps[-1]).removesuffix(TEXT)
            if _whole([Path(name + end) for end in (TEXT, BUFFERS)]):
                return Path(name)
        if not alive:
            return None
        time.sleep(POLL_S)


def _whole(paths: Sequence[Path]) -> bool:
    """Whether the files are there and no longer grow."""
    sizes = lambda: [path.stat().st_size if path.exists() else 0 for path in paths]
    before = sizes()
    time.sleep(POLL_S)
    return all(before) and before == sizes()


def _read(name: Path) -> tuple[str, Memory]:
    text = Path(f"{name}{TEXT}").read_text()
    return text, memory_of(Path(f"{name}{BUFFERS}").read_text())


def memory_of(assignment: str) -> Memory:
    """Memory from XLA's list of allocations; those with a colour lie on the chip, not in its main memory."""
    sizes = dict.fromkeys(("arguments", "outputs", "temporaries", "aliased"), 0)
    for size, kind in _ALLOCATION.findall(assignment):
        if "color" in kind or "thread-local" in kind:
            continue
        given, out = "parameter" in kind, "maybe-live-out" in kind
        if "preallocated-temp" in kind or not (given or out):
            sizes["temporaries"] += int(size)
        sizes["arguments"] += int(size) * given
        sizes["outputs"] += int(size) * out
        sizes["aliased"] += int(size) * (given and out)
    peak = sizes["arguments"] + sizes["outputs"] + sizes["temporaries"] - sizes["aliased"]
    return Memory(**sizes, code=0, peak=peak)


def _ended(code: int | None, said, wrong, seconds: float) -> Optimised:
    """What the process says of itself: refused, or an error."""
    said.seek(0)
    wrong.seek(0)
    if code == 0 and (told := said.read().strip()):
        return Optimised("", None, json.loads(told)["refused"], seconds)
    lines = [line for line in wrong.read().splitlines() if line.strip()] or [f"exit code {code}"]
    raise DyncompError(lines[-1].removeprefix("error: "))
