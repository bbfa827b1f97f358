"""A compile that is left once XLA has optimised the program and placed its buffers, before it writes machine code.

On TPUs machine code is most of a compile's time, and nothing of it is needed to know memory, collectives, kernels and
products: they are final by then. Whether kernels become code is not learnt. XLA dumps what it has; the thread that
compiles goes on until the process ends, so such a process compiles one program and is then ended with `os._exit`.
"""

import dataclasses
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    """What a compile that was left had.

    Attributes:
      text: the optimised program.
      memory: of one device.
    """

    text: str
    memory: Memory


def dump_here() -> Path:
    """A new folder that XLA will dump steps into; call it before jax starts."""
    folder = Path(tempfile.mkdtemp(prefix="dyncomp-"))
    asked = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {asked}"
    return folder


def optimised(compile_: Callable[[], Any], folder: Path) -> Optimised | str:
    """Compiles in a thread until the dump of the optimised program is whole.

    Args:
      compile_: returns the compiled step, or XLA's reason for refusing it.
      folder: of `dump_here`.

    Returns:
      What is known, or the reason.
    """
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(compile_())
        except BaseException as error:  # raised again where it can be caught
            ended.append(error)

    threading.Thread(target=work, daemon=True).start()
    while (name := _found(folder)) is None:
        if ended and isinstance(ended[0], BaseException):
            raise ended[0]
        if ended and isinstance(ended[0], str):
            return ended[0]
        if ended and _found(folder) is None:
            raise DyncompError(
                "XLA dumped no optimised program; leave out --no-code (it is for TPUs)"
            )
        time.sleep(POLL_S)
    text = Path(f"{name}{TEXT}").read_text()
    return Optimised(text, memory_of(Path(f"{name}{BUFFERS}").read_text()))


def _found(folder: Path) -> Path | None:
    """Path of the dump's files without their ends, once they are whole."""
    for path in folder.glob(f"*{TEXT}"):
        name = str(path).removesuffix(TEXT)
        if _STEP.search(path.name) and _whole([Path(name + end) for end in (TEXT, BUFFERS)]):
            return Path(name)
    return None


def _whole(paths: Sequence[Path]) -> bool:
    """Whether the files are there and no longer grow."""
    sizes = lambda: [path.stat().st_size if path.exists() else 0 for path in paths]
    before = sizes()
    time.sleep(POLL_S)
    return all(before) and before == sizes()


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
