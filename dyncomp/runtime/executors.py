"""Running decided networks: everything masked (the reference), or segment by segment with survivors compacted.

Segments are unrolled with separate weights: an index into stacked weights inside a loop would copy them, and a `vmap`
of a loop or a branch would run every example to the end.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.aux import Count
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost, Ledger
from dyncomp.core.plans import ExitPlan
from dyncomp.runtime.buckets import powers_of_two, split
from dyncomp.runtime.segments import Segmented


@dataclasses.dataclass(frozen=True)
class Executed:
    """Outputs in the order of the inputs, and what it took.

    Attributes:
      outputs: numpy [b ...].
      exits: int [b], where each example left; ``plan`` holds the same on the device.
      scores: float32 [b s], as far as they were computed, else NaN.
      executed: int64 [s], rows that ran each segment, padding and masked work included.
      prices: of each segment.
    """

    outputs: np.ndarray
    exits: np.ndarray
    scores: np.ndarray
    executed: np.ndarray
    prices: tuple[Cost, ...]

    # Made when asked for: at small batches they would cost as much as a segment.
    @functools.cached_property
    def plan(self) -> ExitPlan:
        """Where each example left, and the scores that decided."""
        return ExitPlan(jnp.asarray(self.exits, jnp.int32), jnp.asarray(self.scores))

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """int64 [s], examples that needed each segment."""
        return np.asarray([(self.exits >= index).sum() for index in range(len(self.prices))])

    @functools.cached_property
    def ledger(self) -> Ledger:
        """``needed`` and ``executed`` times each segment's price."""
        names = [f"segment_{index}" for index in range(len(self.prices))]
        pairs = zip(self.needed[:, None], self.executed[:, None], strict=True)
        counts = dict(zip(names, (Count(*pair) for pair in pairs), strict=True))
        return Ledger(dict(zip(names, self.prices, strict=True))).record(counts)


def _prices(net: Segmented) -> tuple[Cost, ...]:
    return tuple(segment.cost for segment in net.segments)


class MaskedExecutor:
    """Computes every segment for every example in one compiled program and picks afterwards: the reference."""

    def __init__(self, net: Segmented):
        self.net = net
        self._weights = (net.begin_weights, [segment.weights for segment in net.segments])
        self.thresholds = np.zeros(len(net.segments), np.float32)
        self.thresholds[: len(net.thresholds)] = net.thresholds
        self._run = jax.jit(self._all)

    def _all(self, weights, inputs, thresholds):
        carry = self.net.begin(weights[0], inputs)
        outputs, leaves, scores = [], [], []
        for segment, own, threshold in zip(self.net.segments, weights[1], thresholds, strict=True):
            carry, output, leave, score = segment.run(own, carry, threshold)
            outputs.append(output)
            leaves.append(leave)
            scores.append(score)
        leaves[-1] = jnp.ones_like(leaves[-1])
        exits = jnp.argmax(jnp.stack(leaves), axis=0)
        chosen = jnp.stack(outputs)[exits, jnp.arange(exits.shape[0])]
        return chosen, exits, jnp.stack(scores, axis=1)

    def __call__(self, inputs: Any) -> Executed:
        """Runs a batch of any size (each size compiles once)."""
        result = self._run(self._weights, inputs, jnp.asarray(self.thresholds))
        outputs, exits, scores = jax.device_get(result)
        executed = np.full(len(self.net.segments), len(exits))
        return Executed(outputs, exits, scores, executed, _prices(self.net))


class HostExecutor:
    """The host drives compiled segments; after each, the survivors are split into existing bucket sizes.

    Carries stay on the device in one buffer of ``capacity`` rows that is updated in place: a segment gathers its
    rows by index and writes them back, so the number of programs is at most segments x buckets, whatever the batch.
    Only the ``leave`` flags come to the host between segments; outputs are fetched once, at the end. Not thread-safe.

    Args:
      net: the network.
      example: one batch of inputs (numpy or array); only shape and dtype of its rows are read.
      capacity: largest batch; larger ones raise.
      buckets: ascending row counts to compile; default powers of two up to ``capacity``.
      launch: fixed cost of a launch in rows, see `buckets.split`.
    """

    def __init__(
        self,
        net: Segmented,
        example: Any,
        *,
        capacity: int,
        buckets: tuple[int, ...] | None = None,
        launch: int = 4,
    ):
        self.net, self.capacity, self.launch = net, capacity, launch
        self.buckets = tuple(sorted(buckets or powers_of_two(capacity)))
        if self.buckets[-1] > capacity:
            raise DyncompError(
                f"bucket {self.buckets[-1]} exceeds capacity={capacity}; raise capacity"
            )
        self.thresholds = np.zeros(len(net.segments), np.float32)
        self.thresholds[: len(net.thresholds)] = net.thresholds
        self._row = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
        self._buffer = self._empty()
        self._programs: dict[tuple[int, int], Any] = {}

    def _empty(self) -> Any:
        rows = jax.ShapeDtypeStruct((self.capacity, *self._row.shape), self._row.dtype)
        shapes = jax.eval_shape(self.net.begin, self.net.begin_weights, rows)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    @property
    def compilations(self) -> int:
        """Programs built so far."""
        return len(self._programs)

    def warm_up(self) -> "HostExecutor":
        """Compiles every segment at every bucket size, ahead of time."""
        for index in range(len(self.net.segments)):
            for bucket in self.buckets:
                self._program(index, bucket)
        return self

    def _program(self, index: int, bucket: int) -> Any:
        key = (index, bucket)
        if key not in self._programs:
            first, last = index == 0, index == len(self.net.segments) - 1
            fn = self._first if first else self._later
            rows = jax.ShapeDtypeStruct((bucket,), jnp.int32)
            inputs = jax.ShapeDtypeStruct((bucket, *self._row.shape), self._row.dtype)
            tau = jax.ShapeDtypeStruct((), jnp.float32)
            donated = () if last else (1,)
            step = jax.jit(lambda *args: fn(index, last, *args), donate_argnums=donated)
            args = (self._weights(index), self._buffer, rows, tau) + ((inputs,) if first else ())
            self._programs[key] = step.lower(*args).compile()
        return self._programs[key]

    def _weights(self, index: int) -> Any:
        own = self.net.segments[index].weights
        return (self.net.begin_weights, own) if index == 0 else own

    def _first(self, index, last, weights, buffer, rows, threshold, inputs):
        carry = self.net.begin(weights[0], inputs)
        return self._one(index, last, weights[1], buffer, rows, threshold, carry)

    def _later(self, index, last, weights, buffer, rows, threshold):
        carry = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), buffer)
        return self._one(index, last, weights, buffer, rows, threshold, carry)

    def _one(self, index, last, weights, buffer, rows, threshold, carry):
        carry, output, leave, score = self.net.segments[index].run(weights, carry, threshold)
        if last:
            return None, output, leave, score
        # Rows past the capacity are padding: read as the last row, never written.
        put = lambda leaf, new: leaf.at[rows].set(new.astype(leaf.dtype), mode="drop")
        return jax.tree.map(put, buffer, carry), output, leave, score

    def __call__(self, inputs: Any) -> Executed:
        """Runs a batch of at most ``capacity`` examples."""
        inputs = np.asarray(inputs)
        b, parts = len(inputs), len(self.net.segments)
        if not 1 <= b <= self.capacity:
            raise DyncompError(f"a batch of {b}: this executor takes 1..{self.capacity} examples")
        exits = np.full(b, parts - 1)
        executed, done = np.zeros(parts, np.int64), []
        alive = np.arange(b)
        for index in range(parts):
            chunks = self._launch(index, alive, inputs)
            executed[index] = sum(size for size, *_ in chunks)
            stay = []
            for _, ids, output, leave, score in chunks:
                gone = np.asarray(leave)[: len(ids)] | (index == parts - 1)
                exits[ids[gone]] = index
                stay.append(ids[~gone])
                done.append((index, ids, gone, output, score))
            alive = np.concatenate(stay)
            if not len(alive):
                break
        outputs, scores = self._gather(done, b)
        return Executed(outputs, exits, scores, executed, _prices(self.net))

    def _launch(self, index: int, alive: np.ndarray, inputs: np.ndarray) -> list[tuple]:
        """Dispatches one segment for all survivors before anything is waited for."""
        chunks, start = [], 0
        last = index == len(self.net.segments) - 1
        for size in split(len(alive), self.buckets, self.launch):
            ids = alive[start : start + size]
            start += size
            rows = np.full(size, self.capacity, np.int32)
            rows[: len(ids)] = ids
            args = (self._weights(index), self._buffer, rows, self.thresholds[index])
            if index == 0:
                args += (inputs[np.minimum(rows, len(inputs) - 1)],)
            buffer, *result = self._program(index, size)(*args)
            self._buffer = self._buffer if last else buffer
            chunks.append((size, ids, *result))
        return chunks

    def _gather(self, done: list[tuple], b: int) -> tuple[np.ndarray, np.ndarray]:
        """Outputs and scores in the order of the inputs."""
        sample = np.asarray(done[0][3])
        outputs = np.zeros((b, *sample.shape[1:]), sample.dtype)
        scores = np.full((b, len(self.net.segments)), np.nan, np.float32)
        for index, ids, gone, output, score in done:
            scores[ids, index] = np.asarray(score)[: len(ids)]
            outputs[ids[gone]] = np.asarray(output)[: len(ids)][gone]
        return outputs, scores
