"""Throughput: a queue at every depth, and a segment runs when a full bucket waits for it."""

import collections
import dataclasses
import heapq
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.runtime.buckets import powers_of_two
from dyncomp.runtime.check import check_inputs
from dyncomp.runtime.executed import warn_of_nan
from dyncomp.runtime.flat import Flat, flatten, refuse_tracers
from dyncomp.runtime.programs import Chunk, Driven, Programs
from dyncomp.runtime.saved import load_segments
from dyncomp.runtime.segments import Segmented

IN_FLIGHT = 2
"""Launches whose decisions have not been read: the next starts before the host reads the last."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """One example that has left.

    Attributes:
      ticket: as `StreamExecutor.submit` gave it.
      output: of the segment it left after.
      exit: that segment.
      waited: seconds from `StreamExecutor.submit` until its output was read.
    """

    ticket: int
    output: np.ndarray
    exit: int
    waited: float


@dataclasses.dataclass
class _Queue:
    """Who waits for one segment: (since when, slot; for the first, ticket), a heap, longest first.

    "Since when" counts earlier queues as well: now less all waiting so far. Time in a launch is none.
    """

    members: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def add(self, member: int, since: float) -> None:
        heapq.heappush(self.members, (since, member))

    def take(self, count: int) -> list[tuple[float, int]]:
        return [heapq.heappop(self.members) for _ in range(count)]


class StreamExecutor(Driven):
    """Serves a stream of examples through a network; batches form anew at every depth.

    The deepest segment for which a full bucket waits runs next, so what has begun ends first. One for which somebody
    has waited longer than ``max_wait``, in all queues together, goes before it, with as many as there are. Not
    thread-safe: call `submit` and `step` from one loop.

    Args:
      net: the network.
      example: inputs; only shape and dtype of a row are read.
      bucket: rows of a full launch.
      max_wait: seconds in queues, of all depths together and without time in launches; None waits for full buckets
        until `drain`.
      clock: seconds now.

    Attributes:
      executed: int64 [s], rows that ran each segment so far, padding included.
      needed: int64 [s], those that were some example's.
    """

    def __init__(
        self,
        net: Segmented,
        example: Any,
        *,
        bucket: int = 64,
        max_wait: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        slots = self.slots(len(net.segments), bucket)
        self._set(flatten(net, example), slots, powers_of_two(bucket), max_wait, clock)

    def _set(
        self,
        flat: Flat,
        slots: int,
        sizes: tuple[int, ...],
        max_wait: float | None,
        clock: Callable[[], float],
    ) -> None:
        if max_wait is not None and max_wait < 0:
            raise DyncompError(
                f"max_wait={max_wait}: give seconds, or None to wait for full buckets"
            )
        self.bucket, self.max_wait, self._clock = sizes[-1], max_wait, clock
        self._programs = Programs(flat, slots, sizes)
        self._free = list(range(slots))
        self._queues = [_Queue() for _ in range(flat.graph.end)]
        self._inputs: dict[int, np.ndarray] = {}
        self._begun: dict[int, float] = {}
        self._tickets = np.zeros(slots, np.int64)
        self._waits = np.zeros(slots)
        self._visits = np.zeros((slots, self.graph.end), np.int32)
        self._flying: collections.deque[Chunk] = collections.deque()
        self._next = 0
        self.executed = np.zeros(self.graph.end, np.int64)
        self.needed = np.zeros(self.graph.end, np.int64)

    @staticmethod
    def slots(segments: int, bucket: int) -> int:
        """Slots of the buffer: every depth may hold one example less than a bucket, and the first still finds room."""
        return bucket * (segments + IN_FLIGHT)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        max_wait: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> "StreamExecutor":
        """A stream of segments that `save_segments` wrote; needs no model. A full launch is the largest bucket saved.

        Raises:
          DyncompError: they were saved with a smaller ``capacity`` than `slots`.
        """
        flat, capacity, sizes = load_segments(folder)
        wanted = cls.slots(flat.graph.end, sizes[-1])
        if capacity < wanted:
            raise DyncompError(
                f"{folder}: capacity={capacity} is too small for a stream in buckets of {sizes[-1]}; save the"
                f" segments with capacity={wanted}"
            )
        made = cls.__new__(cls)
        made._set(flat, capacity, sizes, max_wait, clock)
        return made

    @property
    def pending(self) -> int:
        """Examples that have not left."""
        return len(self._begun)

    def submit(self, inputs: Any) -> list[int]:
        """Takes examples [n ...] in; returns a ticket for each.

        Raises:
          DyncompError: rows of another shape or dtype than those it was made for, or inputs that are being
            differentiated or traced; nothing was taken in.
        """
        refuse_tracers(inputs)
        inputs, now = np.asarray(inputs), self._clock()
        check_inputs(inputs, self._programs.flat.row)
        tickets = list(range(self._next, self._next + len(inputs)))
        self._next += len(inputs)
        for ticket, row in zip(tickets, inputs, strict=True):
            self._inputs[ticket], self._begun[ticket] = row, now
            self._queues[0].add(ticket, now)
        return tickets

    def step(self, *, flush: bool = False) -> list[Finished]:
        """Starts at most one launch and reads at most one that is done; what left by it.

        Args:
          flush: run what waits although no bucket is full: the deepest first, so that what has begun ends, and those
            who come meanwhile begin together.
        """
        chosen = self._choose(flush)
        if chosen is not None:
            self._launch(*chosen)
        if self._flying and (chosen is None or len(self._flying) >= IN_FLIGHT):
            return self._read(self._flying.popleft())
        return []

    def drain(self) -> list[Finished]:
        """Runs until nobody is left."""
        found = []
        while self.pending:
            found += self.step(flush=True)
        return found

    def _choose(self, flush: bool) -> tuple[int, int] | None:
        """(segment, how many), or None where nothing should start now."""
        ready = [self._ready(index) for index in range(self.graph.end)]
        late = self._late(ready)
        if late is not None:
            return late, ready[late]
        full = [index for index, count in enumerate(ready) if count >= self.bucket]
        if full:
            return full[-1], self.bucket
        some = [index for index, count in enumerate(ready) if count]
        if flush and some and not self._flying:
            return some[-1], ready[some[-1]]
        return None

    def _ready(self, index: int) -> int:
        """How many could run a segment now, at most a bucket."""
        count = min(len(self._queues[index].members), self.bucket)
        return min(count, len(self._free)) if index == 0 else count

    def _late(self, ready: list[int]) -> int | None:
        """The segment for which somebody has waited longest, where that is too long."""
        if self.max_wait is None:
            return None
        oldest = [
            (self._queues[index].members[0][0], index) for index, count in enumerate(ready) if count
        ]
        since, index = min(oldest, default=(np.inf, 0))
        return index if self._clock() - since > self.max_wait else None

    def _launch(self, index: int, count: int) -> None:
        size = self._programs.split(index, count)[0]
        since, members = zip(*self._queues[index].take(min(count, size)), strict=True)
        inputs, slots = None, np.asarray(members)
        if index == 0:
            slots = np.asarray([self._free.pop() for _ in members])
            self._tickets[slots], self._visits[slots] = members, 0
            inputs = np.stack([self._inputs.pop(ticket) for ticket in members])
        self._waits[slots] = self._clock() - np.asarray(since)
        self.executed[index] += size
        self.needed[index] += len(slots)
        self._flying.append(self._programs.launch(index, size, slots, inputs))

    def _read(self, chunk: Chunk) -> list[Finished]:
        index, slots, places = chunk.index, chunk.slots, chunk.places
        self._visits[slots, index] += 1
        if self.graph.decides(index):
            warn_of_nan(np.isnan(np.asarray(chunk.score)[places]))
        route = np.asarray(chunk.route)[places]
        onward = self.graph.onward(index, route, self._visits[slots, index])
        gone, now = onward == self.graph.end, self._clock()
        stay = slots[~gone]
        since = (now - self._waits[stay]).tolist()
        for slot, target, begun in zip(stay.tolist(), onward[~gone].tolist(), since, strict=True):
            self._queues[target].add(slot, begun)
        if not gone.any():
            return []
        outputs = np.asarray(chunk.output)[places[gone]]
        self._free.extend(slots[gone].tolist())
        return [
            Finished(ticket, np.asarray(output), index, now - self._begun.pop(ticket))
            for ticket, output in zip(self._tickets[slots[gone]].tolist(), outputs, strict=True)
        ]
