"""Interleaved timing of two things, order statistics of the ratios, and the one format of a row.

Machines drift: another job starts, a processor slows down. So both sides run in turn, each pair gives one ratio, and a
row is the median ratio with an interval that assumes nothing about the distribution.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from dyncomp.evidence.stats import Estimate
from dyncomp.evidence.stats import holds as judge

Clock = Literal["wall", "cpu"]
TAILS = 20
"""One in so many intervals may miss: 95%."""


@dataclasses.dataclass
class Pairs:
    """Seconds of both sides, one entry a pair.

    Attributes:
      ours, peer: wall-clock seconds.
      ours_cpu, peer_cpu: processor seconds of the whole process, all threads.
    """

    ours: list[float] = dataclasses.field(default_factory=list)
    peer: list[float] = dataclasses.field(default_factory=list)
    ours_cpu: list[float] = dataclasses.field(default_factory=list)
    peer_cpu: list[float] = dataclasses.field(default_factory=list)

    def ratios(self, clock: Clock = "wall") -> list[float]:
        """ours / peer of every pair."""
        sides = (self.ours, self.peer) if clock == "wall" else (self.ours_cpu, self.peer_cpu)
        return [ours / peer for ours, peer in zip(*sides, strict=True)]

    def seconds(self, clock: Clock = "wall") -> tuple[float, float]:
        """Median seconds of (ours, peer)."""
        sides = (self.ours, self.peer) if clock == "wall" else (self.ours_cpu, self.peer_cpu)
        return float(np.median(sides[0])), float(np.median(sides[1]))


def interleaved(
    ours: Callable[[], Any], peer: Callable[[], Any], pairs: int, warm_up: int = 2
) -> Pairs:
    """Times both in turn; which goes first alternates. Both must return only when their work is done.

    Args:
      ours, peer: what is timed; run ``warm_up`` times each before.
      pairs: how many pairs.
    """
    for _ in range(warm_up):
        ours(), peer()
    found = Pairs()
    sides = ((ours, found.ours, found.ours_cpu), (peer, found.peer, found.peer_cpu))
    for index in range(pairs):
        for call, wall, cpu in sides if index % 2 == 0 else sides[::-1]:
            clock = Stopwatch()
            call()
            clock.stop(wall, cpu)
    return found


class Stopwatch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self, wall: list[float], cpu: list[float]) -> None:
        """Appends the seconds to both lists."""
        wall.append(time.perf_counter() - self.wall)
        cpu.append(time.process_time() - self.cpu)


def median_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Median, and the narrowest symmetric pair of order statistics that covers it with at least 95%.

    The i-th smallest and the i-th largest of n enclose the true median unless fewer than i values fall on one side:
    coverage 1 - 2 P(Binomial(n, 1/2) < i), whatever the distribution (David and Nagaraja, Order Statistics, 2003,
    sec. 7.1). None where even the extremes cover less: n < 6.
    """
    ordered = sorted(values)
    rank = _rank(len(ordered))
    interval = (ordered[rank - 1], ordered[-rank]) if rank else None
    return float(np.median(ordered)), interval


def _rank(n: int) -> int:
    """The largest i with P(Binomial(n, 1/2) < i) <= 2.5%; 0 when there is none."""
    below, rank = 0, 0
    while rank < n // 2:
        below += math.comb(n, rank)
        if 2 * below * TAILS > 2**n:
            break
        rank += 1
    return rank


def row(
    name: str,
    ratio: float,
    interval: Sequence[float] | None,
    *,
    reference: str,
    runs: int,
    goal: float | None = None,
    relation: str = "report",
    **extra: Any,
) -> dict[str, Any]:
    """A row in the common format.

    Args:
      name: the row's id, ``bench/row``.
      ratio: the figure; below 1 means that ours takes less, where both sides are timed.
      interval: of 95%; None for too few runs. An exact figure repeats itself.
      reference: what ``ratio`` stands for, in words.
      runs: pairs or repetitions.
      goal, relation: what is asked: "<=", ">=", "abs(ratio - 1) <= goal", or "report" for nothing.
      **extra: ``peer``, ``median_ours``, ``median_peer``, ``needed``, ``executed`` (None by default), ``holds`` where
        the rule is another one, and fields of this bench alone.
    """
    common = dict.fromkeys(("peer", "median_ours", "median_peer", "needed", "executed"))
    bounds = None if interval is None else (float(interval[0]), float(interval[1]))
    found = {"id": name, "ratio": ratio, "interval": bounds and list(bounds), "goal": goal}
    verdict = None if "holds" in extra else _verdict(relation, goal, ratio, bounds, runs)
    found |= {"relation": relation, "holds": verdict, "reference": reference}
    return {**found, **common, "runs": runs, **extra}


def _verdict(
    relation: str,
    goal: float | None,
    ratio: float,
    bounds: tuple[float, float] | None,
    runs: int,
) -> bool | str | None:
    """True or False where the whole interval is on one side of the goal, else "unresolved"; None without a goal."""
    if goal is None:
        return None
    if relation == "abs(ratio - 1) <= goal" and bounds is not None:
        low, high = bounds[0] - 1, bounds[1] - 1
        least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        bounds, ratio, relation = (least, max(abs(low), abs(high))), abs(ratio - 1), "<="
    return judge(relation, goal, Estimate(ratio, bounds, runs), needed=1)


def row_of_pairs(
    name: str, pairs: Pairs, *, reference: str, clock: Clock = "wall", **extra: Any
) -> dict[str, Any]:
    """A row of ours / peer by one clock, with the medians in seconds; the other clock's figures beside it."""
    ratio, interval = median_interval(pairs.ratios(clock))
    ours, peer = pairs.seconds(clock)
    other: Clock = "cpu" if clock == "wall" else "wall"
    beside = median_interval(pairs.ratios(other))
    both = {"clock": clock, f"{other}_ratio": beside[0], f"{other}_interval": beside[1]}
    more: dict[str, Any] = {"median_ours": ours, "median_peer": peer, **both, **extra}
    return row(name, ratio, interval, reference=reference, runs=len(pairs.ours), **more)
