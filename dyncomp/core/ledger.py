"""The ledger: event counts from the device times static costs, summed in Python integers.

FLOPs count a multiply-add as 2; bytes are those an event must move at least. Counts arrive as int32 arrays and
are summed exactly on the host, so ledgers merge over steps, devices and hosts without rounding.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dyncomp.core.aux import Count, flatten
from dyncomp.core.errors import DyncompError


@dataclasses.dataclass(frozen=True)
class Cost:
    """Price of one event, as Python integers."""

    flops: int
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


@dataclasses.dataclass
class Entry:
    """Totals of one event: how often it was needed and executed, and its price."""

    cost: Cost
    needed: int = 0
    executed: int = 0


class Ledger:
    """Adds up what was computed.

    Args:
      costs: nested dict of `Cost`, as a model's ``cost(...)`` returns it.
    """

    def __init__(self, costs: Mapping[str, Any]):
        self.entries = {path: Entry(cost) for path, cost in flatten(costs).items()}

    def record(self, events: Mapping[str, Any]) -> "Ledger":
        """Adds a tree of `Count` (arrays of any shape are summed); returns self.

        Raises:
          DyncompError: an event has no price, so the total would be too small.
        """
        for path, counted in flatten(events).items():
            if path not in self.entries:
                raise DyncompError(
                    f"event {path!r} has no cost; add it to the module's cost() table"
                )
            assert isinstance(counted, Count), path
            entry = self.entries[path]
            entry.needed += int(np.asarray(counted.needed).astype(np.int64).sum())
            entry.executed += int(np.asarray(counted.executed).astype(np.int64).sum())
        return self

    def __add__(self, other: "Ledger") -> "Ledger":
        merged = Ledger({})
        for path in [*self.entries, *(p for p in other.entries if p not in self.entries)]:
            mine, theirs = self.entries.get(path), other.entries.get(path)
            cost = (mine or theirs).cost  # type: ignore[union-attr]
            if mine and theirs and mine.cost != theirs.cost:
                raise DyncompError(f"event {path!r} has two prices: {mine.cost} and {theirs.cost}")
            pair = [entry for entry in (mine, theirs) if entry]
            merged.entries[path] = Entry(
                cost, sum(e.needed for e in pair), sum(e.executed for e in pair)
            )
        return merged

    def total(self, which: str = "needed", *, unit: str = "flops", under: str = "") -> int:
        """Total FLOPs (or ``unit="bytes"``) needed or executed, of events whose path contains ``under``."""
        entries = (e for path, e in self.entries.items() if under in path)
        return sum(getattr(e, which) * getattr(e.cost, unit) for e in entries)

    def events(self, which: str = "needed", *, under: str = "") -> int:
        """How many events (whose path contains ``under``) were needed or executed."""
        return sum(getattr(e, which) for path, e in self.entries.items() if under in path)

    def rows(self) -> Iterable[dict[str, Any]]:
        """One dict an event: path, counts, price and totals; for tables and JSON."""
        for path, entry in sorted(self.entries.items()):
            yield {
                "event": path,
                "needed": entry.needed,
                "executed": entry.executed,
                "flops_each": entry.cost.flops,
                "bytes_each": entry.cost.bytes,
                "flops_needed": entry.needed * entry.cost.flops,
                "flops_executed": entry.executed * entry.cost.flops,
            }


def matmul_cost(rows: int, inner: int, columns: int, itemsize: int = 4) -> Cost:
    """Cost of a [rows, inner] x [inner, columns] product: 2 FLOPs a multiply-add; operands and result moved once."""
    moved = (rows * inner + inner * columns + rows * columns) * itemsize
    return Cost(2 * rows * inner * columns, moved)
