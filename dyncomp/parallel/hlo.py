"""Reads compiled program text: which collectives and which kernels it has, and how often they run.

XLA's text is not an interface, so only what has been stable for years is read: one instruction a line, shapes in front
of the operation, channel numbers, custom call targets, computations by name. A collective that the compiler split into
a start, fused steps and a done keeps one channel number and counts once. Channel 1 is shared by all that were written
inside a `shard_map`: those count one by one, but for fused steps.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
KERNELS = ("tpu_custom_call", "__gpu$", "mosaic_gpu")
"""How names of custom calls begin that are hand-written kernels, on TPUs and by both Pallas backends on GPUs."""

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\([^{]*)?.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_COLLECTIVE = re.compile(r" (" + "|".join(KINDS) + r")(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[^0-9}]*"?n?"?[^0-9}]*(\d+)')
_NAME = re.compile(r"%[\w.\-]+")
_NOTES = re.compile(r", (?:metadata|sharding|frontend_attributes)=\{(?:[^{}]|\{[^{}]*\})*\}")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind in one step.

    Attributes:
      sites: places in the program.
      runs: executions a step; a loop of unknown length counts once.
      bytes: bytes of results on one device a step, same caveat.
      sent: bytes that one device sends a step by a ring algorithm, same caveat.
    """

    sites: int = 0
    runs: int = 0
    bytes: int = 0
    sent: int = 0


def anonymous(text: str) -> list[str]:
    """The instructions in order, without names, places in the source and notes on sharding: what a program does."""
    lines = (line for line in text.splitlines() if _INSTRUCTION.match(line))
    return [_NAME.sub("%", _NOTES.sub("", line)).strip() for line in lines]


def collectives(text: str) -> dict[str, Traffic]:
    """Traffic by kind."""
    program = computations(text)
    times = executions(program)
    fused = {f for lines in program.values() for _, line in lines for f in _fusions(line)}
    everyone = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    best: dict[tuple[str, str], tuple[int, int, int]] = {}
    for name, lines in program.items():
        for label, line in lines:
            if found := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                alone = channel is None or (channel.group(1) == "1" and name not in fused)
                key = (found.group(1), label if alone else channel.group(1))
                bytes_ = _result_bytes(line[: found.start()])
                size = (times.get(name, 1), bytes_, _group(line, everyone))
                best[key] = max(best.get(key, (0, 0, 0)), size)
    out: dict[str, Traffic] = {}
    for (kind, _), (runs, size, group) in best.items():
        traffic = out.setdefault(kind, Traffic())
        traffic.sites += 1
        traffic.runs += runs
        traffic.bytes += runs * size
        traffic.sent += runs * _sent(kind, size, group)
    return dict(sorted(out.items()))


def _group(line: str, everyone: int) -> int:
    """Devices that take part in a collective together.

    ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` and ``mesh['a'=2,'b'=2] {'b'}`` all say two; an axis may be split, ``'b':(1)2``.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(counted[1])
    if meshed := re.search(r"replica_groups=\S*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", meshed[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", meshed[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    return everyone


def _sent(kind: str, size: int, group: int) -> int:
    """Bytes that one of ``group`` devices sends for a result of ``size`` bytes, pieces going round a ring."""
    pieces = {"all-reduce": 2, "reduce-scatter": group, "collective-permute": 0}.get(kind, 1)
    return size * pieces * (group - 1) // group if pieces else size


def kernels(text: str) -> dict[str, int]:
    """Places in the program that call a hand-written kernel, by the kernel's name."""
    found: dict[str, int] = {}
    for lines in computations(text).values():
        for label, line in lines:
            if is_kernel(line):
                name = re.sub(r"[.\d]+$", "", label)
                found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def is_kernel(line: str) -> bool:
    """Whether an instruction calls a hand-written kernel."""
    return any(f'custom_call_target="{target}' in line for target in KERNELS)


def computations(text: str) -> dict[str, list[tuple[str, str]]]:
    """Computation name -> [(instruction name, rest of its line)]; the entry is called ``ENTRY``."""
    out: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    for line in text.splitlines():
        if line and not line[0].isspace():
            head = None if line.startswith("HloModule") else _HEAD.match(line)
            current = out.setdefault("ENTRY" if head[1] else head[2], []) if head else None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append((found.group(1), found.group(2)))
    return out


def _fusions(line: str) -> Iterator[str]:
    return called(line) if " fusion(" in line else iter(())


def called(line: str) -> Iterator[str]:
    """Names of the computations that an instruction calls."""
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def executions(program: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, int]:
    """How often each computation runs a step, as far as loop lengths can be read."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        if name not in program or times.get(name, 0) >= count:
            return
        times[name] = count
        for _, line in program[name]:
            trips = _trip_count(line, program) if " while(" in line else 1
            for callee in called(line):
                visit(callee, count * trips)

    visit("ENTRY", 1)
    return times


def _trip_count(line: str, program: Mapping[str, Sequence[tuple[str, str]]]) -> int:
    """Iterations of a while loop: as noted by XLA, or the one constant its condition compares with."""
    if noted := _TRIPS.search(line):
        return int(noted.group(1))
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    body = program.get(condition.group(1), []) if condition else []
    limits = [int(found) for _, text in body for found in _LIMIT.findall(text)]
    return limits[0] if len(limits) == 1 and limits[0] > 0 else 1


def _result_bytes(shapes: str) -> int:
    """Bytes of a result; of the ((operands), results, context) tuple of an asynchronous start, the results."""
    sizes = [bytes_of(kind, dims) for kind, dims in _SHAPE.findall(shapes)]
    if shapes.lstrip().startswith("(("):
        operands = len(_SHAPE.findall(shapes[: _closing(shapes)]))
        return sum(sizes[operands : 2 * operands])
    return sum(sizes)


def _closing(shapes: str) -> int:
    """Place of the parenthesis that closes the second one opened (layouts hold some of their own)."""
    depth = 0
    for place, letter in enumerate(shapes):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and depth == 1:
            return place
    return len(shapes)


def bytes_of(kind: str, dims: str) -> int:
    """Bytes of an array, such as of ``bf16`` and ``4,8``; 0 for what is none."""
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind) or (int(digits.group()) if digits else 0)
    count = 1
    for dim in filter(None, dims.split(",")):
        count *= int(dim)
    return -(-count * bits // 8)
