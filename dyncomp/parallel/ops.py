"""What kinds of operations a compiled program runs, and how much each multiplies and moves.

Reads the same text as `dyncomp.parallel.hlo`. An operation is an instruction that the device runs as one: a fusion, a
copy, a kernel. It reads its operands from and writes its results to the device's memory, unless the compiler placed
them on the chip (memory space 1 in a layout). A fusion that takes a slice of an operand reads the slice only; one that
updates a slice in place writes the slice only. Collectives are in `hlo.collectives`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dyncomp.parallel import hlo

ON_CHIP = "S(1)"
"""Memory space of a layout that is no main memory."""

_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_ESTIMATE = re.compile(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)')
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
}
_MOVES = {
    *("copy", "copy-start", "slice", "slice-start", "dynamic-slice", "dynamic-slice-start"),
    *("transpose", "concatenate", "pad", "reshape", "dynamic-update-slice", "broadcast"),
}


@dataclasses.dataclass
class Work:
    """Operations in one step, on one device; a loop of unknown length counts once.

    Attributes:
      sites: places in the program.
      runs: executions a step.
      flops: of matrix products and convolutions, a multiply-add being 2; of kernels, what they say of themselves.
      bytes: read from and written to the device's memory.
      cycles: the compiler's own estimate; 0 where it gives none.
    """

    sites: int = 0
    runs: int = 0
    flops: int = 0
    bytes: int = 0
    cycles: int = 0


@dataclasses.dataclass(frozen=True)
class Operation:
    """One place in the program.

    Attributes:
      name: the compiler's.
      kind: ``product``, ``kernel``, ``move``, ``gather``, ``reduce``, ``elementwise`` or ``other``.
      source: what it was traced from (of a fusion, its last part).
      work: of all its runs in a step.
    """

    name: str
    kind: str
    source: str
    work: Work


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: text of the result's shape.
      opcode: such as ``fusion``.
      operands: names.
      line: everything behind the equals sign.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str


def operations(text: str) -> list[Operation]:
    """Everything that the device runs one by one, but for collectives."""
    program = Program(hlo.computations(text))
    times = hlo.executions(program.lines)
    found = []
    for name in program.scheduled():
        for made in program[name].values():
            skipped = made.opcode in _FREE or made.opcode.endswith("-done") or not made.opcode
            if not skipped and not _collective(made):
                found.append(program.operation(name, made, times.get(name, 1)))
    return found


def by_kind(found: Sequence[Operation]) -> dict[str, Work]:
    """Sums."""
    out: dict[str, Work] = {}
    for each in found:
        total = out.setdefault(each.kind, Work())
        for field in dataclasses.fields(Work):
            more = getattr(total, field.name) + getattr(each.work, field.name)
            setattr(total, field.name, more)
    return dict(sorted(out.items()))


def _collective(made: Instruction) -> bool:
    return made.opcode.removesuffix("-start") in hlo.KINDS


class Program:
    """The computations of a program, parsed when they are asked for.

    Args:
      lines: computation -> [(instruction, rest of its line)].
    """

    def __init__(self, lines: Mapping[str, Sequence[tuple[str, str]]]):
        self.lines = lines
        self._parsed: dict[str, dict[str, Instruction]] = {}

    def __getitem__(self, name: str) -> dict[str, Instruction]:
        if name not in self._parsed:
            made = (_parse(label, line) for label, line in self.lines.get(name, ()))
            self._parsed[name] = {each.name: each for each in made}
        return self._parsed[name]

    def scheduled(self) -> list[str]:
        """Computations whose instructions the device runs one by one."""
        found, todo = ["ENTRY"], ["ENTRY"]
        while todo:
            for made in self[todo.pop()].values():
                if made.opcode in ("while", "conditional", "call"):
                    for callee in hlo.called(made.line):
                        if callee not in found and callee in self.lines:
                            found.append(callee)
                            todo.append(callee)
        return found

    def operation(self, name: str, made: Instruction, runs: int) -> Operation:
        """An instruction of computation ``name`` that runs so often."""
        cycles, source = _CYCLES.search(made.line), _SOURCE.search(made.line)
        own = Work(1, runs, runs * self.flops(made), runs * self.bytes(name, made))
        own.cycles = runs * int(cycles[1]) if cycles else 0
        return Operation(made.name, self.kind(made), source[1] if source else "", own)

    def inner(self, made: Instruction) -> dict[str, Instruction]:
        """What a fusion (or an asynchronous start) holds; empty for others."""
        if made.opcode not in ("fusion", "async-start"):
            return {}
        callee = next(iter(hlo.called(made.line)), None)
        return self[callee] if callee else {}

    def opcodes(self, made: Instruction) -> Iterator[str]:
        """The opcode, or those of everything that is fused."""
        held = self.inner(made)
        if not held:
            yield made.opcode
        for each in held.values():
            yield from self.opcodes(each)

    def kind(self, made: Instruction) -> str:
        """What an operation mostly is."""
        found = set(self.opcodes(made))
        if found & {"convolution", "dot"}:
            return "product"
        if "custom-call" in found:
            return "kernel" if hlo.is_kernel(made.line) else "other"
        if found & {"gather", "scatter", "sort"}:
            return "gather"
        if found & {"reduce", "reduce-window"}:
            return "reduce"
        if found <= _FREE | _MOVES:
            return "move"
        return "elementwise" if made.opcode == "fusion" else "other"

    def flops(self, made: Instruction) -> int:
        """Of the products it holds, a multiply-add being 2."""
        if made.opcode == "custom-call":
            said = _ESTIMATE.search(made.line)
            return int(said[1]) if said else 0
        return sum(_product_flops(each, held) for each, held in self._products(made))

    def _products(
        self, made: Instruction
    ) -> Iterator[tuple[Instruction, Mapping[str, Instruction]]]:
        held = self.inner(made)
        for each in held.values():
            if each.opcode in ("convolution", "dot"):
                yield each, held
            else:
                yield from self._products(each)

    def bytes(self, name: str, made: Instruction) -> int:
        """Read from and written to the device's memory by an instruction of computation ``name``."""
        around = self[name]
        if made.opcode.endswith("-start"):  # the result holds the operand again, and a context
            parts = [part for part in _shapes(made.shape) if part[2]]
            both = 1 if any(ON_CHIP in part[0] for part in parts) else 2
            return both * min((_all_bytes(part[0]) for part in parts), default=0)
        given = [around[operand].shape for operand in made.operands if operand in around]
        read = [self._read(made, place, shape) for place, shape in enumerate(given)]
        return sum(read) + self._written(made)

    def _read(self, made: Instruction, place: int, shape: str) -> int:
        """Bytes of operand ``place`` that an instruction reads."""
        whole = _main_bytes(shape)
        if made.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            return min(whole, _all_bytes(made.shape))
        if made.opcode == "dynamic-update-slice" and place == 0:
            return 0
        held = self.inner(made)
        own = next(
            (e.name for e in held.values() if e.line.startswith(f"{e.shape} parameter({place})")),
            None,
        )
        if own is None:
            return whole
        return min(whole, sum(self._read(each, at, shape) for each, at in _users(held, own)))

    def _written(self, made: Instruction) -> int:
        """Bytes of results in main memory; of updates in place, those of the updates."""
        parts, roots = _shapes(made.shape), list(self._roots(made))
        total = 0
        for place, part in enumerate(parts):
            update = roots[place] if len(roots) == len(parts) else None
            size = _main_bytes(part[0])
            total += min(size, update) if update is not None else size
        return total

    def _roots(self, made: Instruction) -> Iterator[int | None]:
        """For every result of a fusion the bytes of the update it is, or None."""
        held = self.inner(made)
        if not held:
            yield None
            return
        root = next(reversed(held.values()))
        for each in (
            [held[n] for n in root.operands if n in held] if root.opcode == "tuple" else [root]
        ):
            while each.opcode == "bitcast" and each.operands and each.operands[0] in held:
                each = held[each.operands[0]]
            if each.opcode == "dynamic-update-slice" and each.operands[1] in held:
                yield _all_bytes(held[each.operands[1]].shape)
            elif each.opcode == "fusion":
                yield next(self._roots(each))
            else:
                yield None


def _users(held: Mapping[str, Instruction], name: str) -> Iterator[tuple[Instruction, int]]:
    """(instruction, place) of every use of ``name``, seen through bitcasts."""
    for each in held.values():
        for place, operand in enumerate(each.operands):
            if operand == name and each.opcode == "bitcast":
                yield from _users(held, each.name)
            elif operand == name:
                yield each, place


def _parse(name: str, line: str) -> Instruction:
    found = _OPCODE.search(line)
    if found is None:
        return Instruction(name, line, "", (), line)
    end, depth = found.end(), 1
    while end < len(line) and depth:
        depth += (line[end] == "(") - (line[end] == ")")
        end += 1
    operands = tuple(_NAME.findall(line[found.end() : end]))
    return Instruction(name, line[: found.start(1)].strip(), found[1], operands, line)


def _shapes(text: str) -> list[tuple[str, str, str]]:
    """(whole text, type, dimensions) of every array in a shape."""
    return [(found[0], found[1], found[2]) for found in _SHAPE.finditer(text)]


def _main_bytes(text: str) -> int:
    """Bytes of the arrays of a shape that lie in main memory."""
    return sum(
        hlo.bytes_of(kind, dims) for part, kind, dims in _shapes(text) if ON_CHIP not in part
    )


def _all_bytes(text: str) -> int:
    return sum(hlo.bytes_of(kind, dims) for _, kind, dims in _shapes(text))


def _dims(text: str) -> list[int]:
    return [int(n) for n in _shapes(text)[0][2].split(",") if n]


def _product_flops(made: Instruction, held: Mapping[str, Instruction]) -> int:
    """Of one dot or convolution whose operands are in the same computation."""
    left, right = (_dims(held[name].shape) for name in made.operands[:2])
    if made.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", made.line)
        inner = [left[int(n)] for n in axes[1].split(",") if n] if axes else []
        return 2 * math.prod(_dims(made.shape)) * math.prod(inner)
    return _convolution_flops(made.line, left, right, _dims(made.shape))


def _convolution_flops(line: str, left: list[int], right: list[int], out: list[int]) -> int:
    """Products of a convolution whose window lies on real input, not on padding or between dilated elements."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert labels is not None, line[:200]
    window = _window(line)
    groups = int(found[1]) if (found := re.search(r"batch_group_count=(\d+)", line)) else 1
    size = lambda dims, letters, letter: dims[letters.index(letter)]
    total = (
        2
        * size(left, labels[1], "b")
        // groups
        * size(right, labels[2], "i")
        * size(right, labels[2], "o")
    )
    for axis in sorted(letter for letter in labels[2] if letter.isdigit()):
        sizes = (
            size(left, labels[1], axis),
            size(right, labels[2], axis),
            size(out, labels[3], axis),
        )
        total *= _positions(sizes, window, int(axis))
    return total


def _window(line: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", line)
    pairs = (part.split("=") for part in (found[1].split() if found else []))
    return {name: value.split("x") for name, value in pairs}


def _positions(sizes: tuple[int, int, int], window: Mapping[str, list[str]], axis: int) -> int:
    """Pairs of (output, window element) along one axis that meet an input element."""
    given, span, out = sizes
    number = lambda name: int(window[name][axis]) if name in window else 1
    low = int(window["pad"][axis].split("_")[0]) if "pad" in window else 0
    return _meeting(
        given, span, out, number("stride"), low, number("lhs_dilate"), number("rhs_dilate")
    )


@functools.cache
def _meeting(
    given: int, span: int, out: int, stride: int, low: int, spread: int, dilate: int
) -> int:
    end, starts = (given - 1) * spread, np.arange(out) * stride - low
    met = lambda places: (places >= 0) & (places <= end) & (places % spread == 0)
    return sum(int(np.count_nonzero(met(starts + k * dilate))) for k in range(span))
