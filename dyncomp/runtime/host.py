"""The host drives compiled segments: after each, those that go on are split into existing bucket sizes."""

from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.runtime.alone import Alone
from dyncomp.runtime.buckets import powers_of_two
from dyncomp.runtime.check import check_inputs
from dyncomp.runtime.everyone import Everyone
from dyncomp.runtime.executed import Executed, executed
from dyncomp.runtime.flat import Flat, flatten, refuse_tracers
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.programs import Chunk, Driven, Programs
from dyncomp.runtime.saved import load_segments
from dyncomp.runtime.segments import Segmented

RARE = 200
"""Where fewer than one in so many leave, the next segment does not wait to be told who."""


class HostExecutor(Driven):
    """Runs batches segment by segment on those examples that need it.

    Only decisions come to the host between segments; outputs are fetched once, at the end. Not thread-safe.

    Args:
      net: the network.
      example: one batch of inputs (numpy or array); only shape and dtype of its rows are read.
      capacity: largest batch; larger ones raise.
      buckets: ascending row counts to compile; default powers of two up to ``capacity``.
      launch: fixed cost of a launch in rows, see `buckets.launch_costs`; `tune` measures instead.
      speculate: start the next segment on the same rows before a decision is read. Hides the wait where few leave;
        the rows of those that leave are run in vain. None does so after segments that fewer than one in 200 left of
        late, and lets a chain with ``capacity`` 1 be one program (`Alone`).
      liveness: False moves every value across every boundary, whoever wants it (to see what liveness saves).
    """

    def __init__(
        self,
        net: Segmented,
        example: Any,
        *,
        capacity: int,
        buckets: tuple[int, ...] | None = None,
        launch: int = 4,
        speculate: bool | None = None,
        liveness: bool = True,
    ):
        sizes = tuple(sorted(buckets or powers_of_two(capacity)))
        self._set(flatten(net, example, liveness), capacity, sizes, launch, speculate)

    def _set(
        self,
        flat: Flat,
        capacity: int,
        sizes: tuple[int, ...],
        launch: int,
        speculate: bool | None,
    ) -> None:
        self.capacity, self.speculate = capacity, speculate
        self._programs = Programs(flat, capacity, sizes, launch)
        self._whole = flat.graph.chain and speculate is None and sizes[-1] == capacity
        self._alone = Alone(flat) if self._whole and capacity == 1 else None
        self._everyone: Everyone | None = None
        self._lately = np.zeros((flat.graph.end, 2))  # who ran each segment, who left after it

    @property
    def compilations(self) -> int:
        """Programs built so far: at most segments x buckets, and one more by `tune`."""
        whole = [each for each in (self._alone, self._everyone) if each is not None]
        return super().compilations + sum(each.compiled for each in whole)

    def warm_up(self) -> "HostExecutor":
        """Compiles what calls will run, ahead of time: every segment at every bucket size, or one program (`Alone`)."""
        if self._alone is None:
            return super().warm_up()
        self._alone.warm_up()
        return self

    def tune(self, repeats: int = 5) -> "HostExecutor":
        """Fits the executor to this machine; call it after `warm_up`, beside the load that calls will meet.

        Measures what a launch of each size costs, and from now on splits batches by that. A chain gets one more
        program, all segments for a whole batch, which is taken where of late nearly nobody left (`Everyone`). Results
        change only as other batch sizes round.

        Args:
          repeats: runs of every program.
        """
        if self._alone is not None:
            return self
        self._programs.measure(repeats)
        if self._whole:
            self._everyone = Everyone(self._programs.flat, self.capacity)
            self._everyone.warm_up()
        return self

    @classmethod
    def load(
        cls, folder: str | Path, *, launch: int = 4, speculate: bool | None = None
    ) -> "HostExecutor":
        """An executor of segments that `save_segments` wrote; needs no model."""
        made = cls.__new__(cls)
        made._set(*load_segments(folder), launch, speculate)
        return made

    def __call__(self, inputs: Any) -> Executed:
        """Runs a batch of at most ``capacity`` examples.

        Raises:
          DyncompError: more examples, rows of another shape or dtype than those it was made for, or inputs that are
            being differentiated or traced.
        """
        refuse_tracers(inputs)
        inputs = np.asarray(inputs)
        check_inputs(inputs, self._programs.flat.row)
        if not 1 <= len(inputs) <= self.capacity:
            raise DyncompError(
                f"a batch of {len(inputs)}: this executor takes 1..{self.capacity} examples"
            )
        if self._alone is not None:
            return self._alone(inputs, self.thresholds)
        if self._everyone is not None and self._nobody_leaves(len(inputs)):
            return self._learn(self._everyone(inputs, self.thresholds))
        return self._learn(self._split(inputs))

    def _nobody_leaves(self, rows: int) -> bool:
        """Whether of late so few left that all segments may as well be one program, for so many rows."""
        ran, left = self._lately[self.graph.deciding].T
        padded = self.buckets[-2] if len(self.buckets) > 1 else 0
        return rows > padded and bool(np.all(ran > RARE * left))

    def _learn(self, ran: Executed) -> Executed:
        """Remembers how many ran each segment and left after it; older calls count half each time."""
        at = np.count_nonzero(ran.visits, axis=0)
        left = np.bincount(ran.exits, minlength=self.graph.end)
        self._lately = self._lately / 2 + np.stack([at, left], axis=1)
        return ran

    def _split(self, inputs: np.ndarray) -> Executed:
        """Segment by segment."""
        walk = _Walk(self.graph, len(inputs))
        ahead: list[Chunk] = []
        while (index := walk.front()) < self.graph.end:
            begun = ahead if ahead and ahead[0].index == index else []
            rest = walk.waiting(index)
            if begun:
                rest = np.setdiff1d(rest, np.concatenate([chunk.slots for chunk in begun]))
            chunks = begun + self._launch(index, rest, inputs)
            ahead = self._ahead(chunks) if self._speculates(index) else []
            walk.count(chunks[len(begun) :] + ahead)
            for chunk in chunks:
                walk.read(chunk)
        return walk.result(self._programs.flat.prices)

    def _speculates(self, index: int) -> bool:
        if self.speculate is not None:
            return self.speculate
        ran, left = self._lately[index]
        return bool(ran > RARE * left)

    def _launch(self, index: int, slots: np.ndarray, inputs: np.ndarray) -> list[Chunk]:
        """Dispatches a segment for all that wait for it before anything is waited for."""
        chunks, start = [], 0
        for size in self._programs.split(index, len(slots)):
            own = slots[start : start + size]
            start += size
            chunks.append(
                self._programs.launch(index, size, own, inputs[own] if index == 0 else None)
            )
        return chunks

    def _ahead(self, chunks: list[Chunk]) -> list[Chunk]:
        """The next segment on the rows of this one, where all that does not leave goes there."""
        index = chunks[0].index
        follows = index + 1, self.graph.end
        if self.graph.targets[index] != follows:
            return []
        return [self._programs.launch(index + 1, chunk.size, chunk.slots) for chunk in chunks]


class _Walk:
    """Where each example of a batch stands, and what came out."""

    def __init__(self, graph: Graph, b: int):
        self.graph = graph
        self.at = np.zeros(b, np.int32)
        self.exits = np.full(b, -1, np.int32)
        self.visits = np.zeros((b, graph.end), np.int32)
        self.rows = np.zeros(graph.end, np.int64)
        self._read: list[tuple[Chunk, np.ndarray, np.ndarray]] = []

    def front(self) -> int:
        """The earliest segment at which some example waits."""
        return int(self.at.min())

    def waiting(self, index: int) -> np.ndarray:
        """Whose turn a segment is."""
        return np.flatnonzero(self.at == index)

    def count(self, chunks: list[Chunk]) -> None:
        """Adds rows that were launched."""
        for chunk in chunks:
            self.rows[chunk.index] += chunk.size

    def read(self, chunk: Chunk) -> None:
        """Waits for a launch's decisions and moves its examples on, but those that left before it."""
        index, slots = chunk.index, chunk.slots
        route = np.asarray(chunk.route)[chunk.places]
        here = self.at[slots] == index
        self.visits[slots[here], index] += 1
        onward = self.graph.onward(index, route, self.visits[slots, index])
        gone = here & (onward == self.graph.end)
        self.at[slots[here]] = onward[here]
        self.exits[slots[gone]] = index
        self._read.append((chunk, here, gone))

    def result(self, prices: tuple[Cost, ...]) -> Executed:
        """Outputs and scores in the order of the inputs."""
        sample = self._read[0][0].output
        outputs = np.zeros((len(self.at), *sample.shape[1:]), sample.dtype)
        scores = np.full((len(self.at), self.graph.end), np.nan, np.float32)
        for (index, _, slots, places, output, _, score), here, gone in self._read:
            scores[slots[here], index] = np.asarray(score)[places[here]]
            if gone.any():
                outputs[slots[gone]] = np.asarray(output)[places[gone]]
        return executed(prices, self.graph, outputs, self.exits, scores, self.visits, self.rows)
