"""What compilers say of single kernels: static schedules on TPUs, registers and spills on GPUs.

On a TPU a bundle is one cycle of instructions, so a schedule is a figure of speed without noise. libtpu writes it where
`told_to_dump` says; the text formats are libtpu 0.0.42's.
"""

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"
CODE = "final_bundles.txt"
MATRIX, FILLS, SPILLS = 0, 6, 8
"""Columns of the table of utilization."""

_LINE = re.compile(r"\s*(0x[0-9a-f]+|\d+)\s+([A-Z]{2})?\s*:\s*(>*)")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A TPU kernel's busiest stretch: the one between labels that uses the matrix units most.

    Attributes:
      bundles: of the stretch.
      matrix: share of the matrix units' slots that it fills.
      spills, fills: vector registers that it writes to and reads from memory, for want of registers.
      total: bundles of the whole kernel.
    """

    bundles: int
    matrix: float
    spills: int
    fills: int
    total: int


@dataclasses.dataclass(frozen=True)
class Registers:
    """A GPU kernel, by ``ptxas``.

    Attributes:
      registers: a thread.
      spill_stores, spill_loads: bytes a thread.
      shared: bytes of static shared memory a block.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int


def told_to_dump() -> Path:
    """A new folder that libtpu will write schedules into; call it before libtpu loads."""
    folder = Path(tempfile.mkdtemp(prefix="dyncomp-"))
    asked = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {asked}"
    return folder


def schedules(folder: Path, kernels: Iterable[str]) -> dict[str, Schedule]:
    """Of each kernel its longest version; kernels that libtpu wrote nothing of are left out.

    Args:
      folder: of `told_to_dump`.
      kernels: names as in `hlo.kernels`.
    """
    found = {}
    for kernel in kernels:
        own = re.compile(rf"-{re.escape(kernel)}[.\d]*-\d+-{UTILIZATION}$")
        tables = [path for path in folder.glob(f"*{UTILIZATION}") if own.search(path.name)]
        made = [_read(path, code) for path in tables if (code := _code(path))]
        if made:
            found[kernel] = max(made, key=lambda each: each.total)
    return found


def _code(table: Path) -> Path | None:
    """The code that belongs to a table: the names differ in a counter and their end."""
    stem = re.sub(rf"-\d+-{UTILIZATION}$", "", table.name)
    found = [path for path in table.parent.glob(f"{stem}-*-{CODE}") if "analysis" not in path.name]
    return found[0] if found else None


def _read(table: Path, code: Path) -> Schedule:
    head, body = table.read_text().split("== UTILIZATION:\n")
    slots = int(head.splitlines()[2].split()[MATRIX])
    used = [[int(n) for n in line.split()] for line in body.splitlines() if line.strip()]
    busiest = max((used[a:b] for a, b in _stretches(code.read_text(), len(used))), key=_matrix)
    count = lambda column: sum(row[column] for row in busiest)
    fill = count(MATRIX) / len(busiest) / slots
    return Schedule(len(busiest), fill, count(SPILLS), count(FILLS), len(used))


def _matrix(rows: list[list[int]]) -> int:
    return sum(row[MATRIX] for row in rows)


def _stretches(code: str, bundles: int) -> Iterator[tuple[int, int]]:
    """(first, end) of what lies between labels; what follows a loop belongs to what is around it."""
    found = (_LINE.match(line) for line in code.splitlines())
    lines = [(int(m[1], 0), m[2], len(m[3])) for m in found if m]
    starts = [i for i, (_, label, _) in enumerate(lines) if label]
    for begin, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        nested = [i for i in range(begin, end) if lines[i][2] >= lines[begin][2]]
        yield lines[begin][0], min(lines[nested[-1]][0] + 1, bundles)
    if not starts:
        yield 0, bundles


def registers(folder: Path) -> dict[str, Registers]:
    """Of every kernel whose PTX XLA dumped (XLA's own and Pallas's Triton ones), by ``ptxas`` on the PATH.

    Mosaic kernels are no PTX of XLA's and are not among them.
    """
    found: dict[str, Registers] = {}
    for path in sorted(folder.glob("*.ptx")):
        words = ["ptxas", "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        said = subprocess.run(words, capture_output=True, text=True).stderr
        found.update(told_by_ptxas(said))
    return found


def told_by_ptxas(said: str) -> dict[str, Registers]:
    """Kernel -> what ``ptxas -v`` says of it."""
    found = {}
    for part in re.split(r"(?=Compiling entry function)", said):
        name, spilled, used = (p.search(part) for p in (_ENTRY, _SPILLED, _USED))
        if name and spilled and used:
            shared = _SHARED.search(part)
            sizes = int(spilled[1]), int(spilled[2]), int(shared[1]) if shared else 0
            found[name[1]] = Registers(int(used[1]), *sizes)
    return found
