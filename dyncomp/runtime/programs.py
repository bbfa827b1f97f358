"""Segments compiled ahead of time for a few row counts, on one buffer that holds what is carried of every slot."""

import hashlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.runtime.buckets import launch_costs, split
from dyncomp.runtime.flat import Flat
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import full_thresholds


class Chunk(NamedTuple):
    """One launch of a segment, results still on the way.

    Attributes:
      index: of the segment.
      size: rows it ran, padding included.
      slots: int [n], whose they were.
      places: int [n], which of the rows these are in what follows.
      output: [size ...].
      route: [size].
      score: [size].
    """

    index: int
    size: int
    slots: np.ndarray
    places: np.ndarray
    output: Any
    route: Any
    score: Any


T = TypeVar("T", bound="Driven")


class Driven:
    """What executors that the host drives have in common."""

    _programs: "Programs"

    @property
    def graph(self) -> Graph:
        """Where examples may go."""
        return self._programs.graph

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row counts that are compiled."""
        return self._programs.buckets

    @property
    def thresholds(self) -> np.ndarray:
        """float32 [s], may be set or written between calls."""
        return self._programs.thresholds

    @thresholds.setter
    def thresholds(self, values: Any) -> None:
        self._programs.thresholds = full_thresholds(values, self.graph.end)

    @property
    def compilations(self) -> int:
        """Programs built so far."""
        return self._programs.compilations

    @property
    def moved(self) -> np.ndarray:
        """int64 [s 2], bytes that each segment reads from the buffer and writes back, for one row."""
        return np.asarray(self._programs.flat.moved, np.int64)

    def warm_up(self: T) -> T:
        """Compiles every segment at every bucket size, ahead of time."""
        self._programs.warm_up()
        return self


class Programs:
    """Compiled segments of a network and the carries they work on, in one buffer of ``capacity`` slots.

    A segment gathers the rows of its slots, runs, and writes back what it changed, in place: the buffer is donated. So
    there is one program for a segment and bucket, whichever rows they are. What a segment does not read is not
    gathered, and what it hands on as it was is not written. The bucket of ``capacity`` rows is the buffer itself and
    moves nothing: every slot stands at its own place; those of others keep theirs where anybody waits elsewhere.

    Args:
      flat: the network.
      capacity: slots.
      buckets: ascending row counts.
      launch: fixed cost of a launch in rows.

    Attributes:
      costs: of one launch, for each segment and bucket; what `split` goes by.
    """

    def __init__(self, flat: Flat, capacity: int, buckets: Sequence[int], launch: int = 4):
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise DyncompError(f"buckets={tuple(buckets)}: give ascending row counts of at least 1")
        if buckets[-1] > capacity:
            raise DyncompError(f"bucket {buckets[-1]} exceeds capacity={capacity}; raise capacity")
        self.flat, self.graph = flat, flat.graph
        self.capacity, self.buckets = capacity, tuple(buckets)
        self.thresholds = np.array(flat.thresholds, np.float32)
        self.costs = [launch_costs(self.buckets, launch)] * self.graph.end
        self._buffer = [jnp.zeros((capacity, *leaf.shape), leaf.dtype) for leaf in flat.carry]
        self._calls: dict[tuple[int, int], Any] = {}
        self._compiled: dict[tuple[bytes, Any, Any], Any] = {}

    @property
    def compilations(self) -> int:
        """Programs built so far, at most segments x buckets: segments that do the same share theirs."""
        return len(self._compiled)

    def warm_up(self) -> None:
        """Compiles every segment for every bucket."""
        for index in range(self.graph.end):
            for bucket in self.buckets:
                self._program(index, bucket)

    def launch(self, index: int, size: int, slots: np.ndarray, inputs: Any = None) -> Chunk:
        """Starts segment ``index`` on ``slots``, at most ``size``; does not wait.

        Args:
          index: of the segment.
          size: one of the buckets.
          slots: int [n].
          inputs: [n ...], for the first segment only.
        """
        places = slots if size == self.capacity else np.arange(len(slots))
        rows = np.full(size, self.capacity, np.int32)
        rows[places] = slots
        args = (self.flat.weights[index], self._buffer, rows, self.thresholds[index])
        if index == 0:
            args += (padded(inputs, places, size),)
        buffer, *result = self._program(index, size)(*args)
        if not self.graph.ends(index):
            self._buffer = buffer
        return Chunk(index, size, slots, places, *result)

    def split(self, index: int, rows: int) -> tuple[int, ...]:
        """Bucket sizes, largest first, that take so many rows through a segment at the least cost."""
        return split(rows, self.buckets, self.costs[index])

    def measure(self, repeats: int) -> None:
        """Makes ``costs`` median seconds of a launch and its decision."""
        row = np.zeros((self.capacity, *self.flat.row.shape), self.flat.row.dtype)
        self.costs = [
            tuple(self._seconds(index, size, row[:size], repeats) for size in self.buckets)
            for index in range(self.graph.end)
        ]

    def _seconds(self, index: int, size: int, inputs: Any, repeats: int) -> float:
        taken = []
        for _ in range(repeats + 1):  # the first builds what is built once
            begin = time.perf_counter()
            chunk = self.launch(index, size, np.arange(size), inputs if index == 0 else None)
            jax.block_until_ready((chunk.route, self._buffer))
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken[1:])

    def _program(self, index: int, bucket: int) -> Any:
        key = (index, bucket)
        if key not in self._calls:
            shapes = self.flat.arguments(index, bucket, self.capacity)
            lowered = self.flat.program(index, bucket).lower(*shapes)
            text = hashlib.sha256(lowered.as_text().encode()).digest()
            same = text, lowered.in_tree, lowered.out_tree
            if same not in self._compiled:
                self._compiled[same] = lowered.compile()
            self._calls[key] = self._compiled[same]
        return self._calls[key]


def padded(inputs: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """Inputs at their places among ``size`` rows; copies of a real one elsewhere, so that padding is never odd."""
    if np.array_equal(places, np.arange(size)):
        return inputs
    placed = np.repeat(inputs[:1], size, axis=0)
    placed[places] = inputs
    return placed
