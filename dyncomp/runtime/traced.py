"""Executors that are one compiled program: everything masked (the reference), branches for all, or compacted.

All three walk over the segments in order, again while a loop has not ended, and keep of every example where it stands.
What differs is which rows a segment runs on. Segments keep their own weights: an index into stacked weights inside a
loop would copy them, and a `vmap` of a loop or a branch would run every example to the end.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int
from dyncomp.runtime.check import check_shapes
from dyncomp.runtime.executed import Executed, executed
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import Carry, Segmented, full_thresholds

How = Literal["masked", "lax", "compact"]


@struct.dataclass
class Walk:
    """Where every example stands.

    Attributes:
      carry: what segments hand on.
      at: int32 [b], the segment that comes next.
      output: [b ...], of those that have left.
      exits: int32 [b], the segment they left after.
      scores: float32 [b s].
      visits: int32 [b s].
      rows: int32 [s], rows that ran each segment.
    """

    carry: Carry
    at: Int[Array, "b"]
    output: Array
    exits: Int[Array, "b"]
    scores: Float[Array, "b s"]
    visits: Int[Array, "b s"]
    rows: Int[Array, "s"]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as jit wants it
class Traced:
    """A network as one pure function ``(weights, inputs, thresholds) -> Walk``, for `jax.jit` and, bounded, `jax.grad`.

    Attributes:
      net: the network; its weights are arguments (`weights`).
      how: "masked" runs every segment on all rows; "lax" does where some example is there; "compact" gathers those
        that are, padded to a bucket.
      buckets: row counts of "compact", ascending; the largest must hold a batch.
      bounded: loops run as often as they may, so that reverse-mode gradients exist; else until all have left.
    """

    net: Segmented
    how: How = "masked"
    buckets: tuple[int, ...] = ()
    bounded: bool = False

    @functools.cached_property
    def graph(self) -> Graph:
        """Where examples may go."""
        return Graph.of(self.net)

    @property
    def weights(self) -> tuple[Any, list[Any]]:
        """Of ``begin``, and of each segment."""
        return self.net.begin_weights, [segment.weights for segment in self.net.segments]

    def __call__(self, weights: Any, inputs: Any, thresholds: Any) -> Walk:
        """Runs a batch to the end.

        Raises:
          DyncompError: not one threshold for each segment.
        """
        if jnp.shape(thresholds) != (self.graph.end,):
            raise DyncompError(
                f"thresholds of shape {jnp.shape(thresholds)}: give one to each of {self.graph.end} segments"
            )
        if not any(map(self.graph.decides, range(self.graph.end))):
            return self._straight(weights, inputs, thresholds)
        walk = self._start(weights, inputs)
        sweep = lambda walk: self._sweep(weights, thresholds, walk)
        if self.graph.sweeps == 1:
            return sweep(walk)
        if self.bounded or self.how == "masked":
            return lax.scan(lambda walk, _: (sweep(walk), None), walk, length=self.graph.sweeps)[0]
        leaves, tree = jax.tree.flatten(walk)
        return tree.unflatten(_until_all_left(self, tree, weights, thresholds, leaves))

    def _straight(self, weights: Any, inputs: Any, thresholds: Any) -> Walk:
        """One segment after the other: nothing is decided, so nothing is picked."""
        check_shapes(self.net, self.graph, inputs)
        carry, output, scores = self.net.begin(weights[0], inputs), jnp.zeros(()), []
        index = last = 0
        while index < self.graph.end:
            run, own = self.net.segments[index].run, weights[1][index]
            carry, output, _, score = run(own, carry, thresholds[index])
            scores.append(score.astype(jnp.float32))
            last, index = index, self.graph.targets[index][0]
        # All segments are on the way: one that nothing reaches is refused.
        b, s = inputs.shape[0], self.graph.end
        return Walk(
            carry=carry,
            at=jnp.full((b,), s, jnp.int32),
            output=output,
            exits=jnp.full((b,), last, jnp.int32),
            scores=jnp.stack(scores, axis=1),
            visits=jnp.ones((b, s), jnp.int32),
            rows=jnp.full((s,), b, jnp.int32),
        )

    def _start(self, weights: Any, inputs: Any) -> Walk:
        carry = self.net.begin(weights[0], inputs)
        output = check_shapes(self.net, self.graph, inputs)
        b, s = output.shape[0], self.graph.end
        return Walk(
            carry=carry,
            at=jnp.zeros((b,), jnp.int32),
            output=jnp.zeros(output.shape, output.dtype),
            exits=jnp.full((b,), -1, jnp.int32),
            scores=jnp.full((b, s), jnp.nan, jnp.float32),
            visits=jnp.zeros((b, s), jnp.int32),
            rows=jnp.zeros((s,), jnp.int32),
        )

    def _sweep(self, weights: Any, thresholds: Any, walk: Walk) -> Walk:
        for index in range(self.graph.end):
            step = functools.partial(self._step, index, weights[1][index], thresholds[index])
            everyone = functools.partial(step, rows=None)
            if self.how == "masked":
                walk = everyone(walk)
            elif self.how == "lax":
                walk = lax.cond(jnp.any(walk.at == index), everyone, lambda walk: walk, walk)
            else:
                walk = self._compacted(index, step, walk)
        return walk

    def _compacted(self, index: int, step: Callable[..., Walk], walk: Walk) -> Walk:
        b = walk.at.shape[0]
        buckets = tuple(size for size in self.buckets if size < b) + (b,)
        here = walk.at == index

        def some(size: int) -> Callable[[Walk], Walk]:
            if size == b:
                return functools.partial(step, rows=None)
            rows = lambda: jnp.nonzero(here, size=size, fill_value=b)[0].astype(jnp.int32)
            return lambda walk: step(walk, rows=rows())

        count = jnp.sum(here, dtype=jnp.int32)
        which = jnp.searchsorted(jnp.asarray((0, *buckets), jnp.int32), count)
        return lax.switch(which, [lambda walk: walk, *map(some, buckets)], walk)

    def _step(self, index: int, weights: Any, threshold: Any, walk: Walk, rows: Any) -> Walk:
        """Segment ``index`` on the rows given (those past the last are padding), or on all."""
        b = walk.at.shape[0]
        take = lambda leaf: leaf if rows is None else leaf.at[rows].get(mode="clip")
        carry, output, route, score = self.net.segments[index].run(
            weights, jax.tree.map(take, walk.carry), threshold
        )
        visits = take(walk.visits[:, index]) + 1
        onward = self.graph.onward(index, route, visits)
        here = walk.at == index if rows is None else rows < b

        def put(leaf: Array, new: Array, which: Array = here) -> Array:
            new = new.astype(leaf.dtype)
            if rows is None:
                return jnp.where(which.reshape(-1, *[1] * (leaf.ndim - 1)), new, leaf)
            return leaf.at[jnp.where(which, rows, b)].set(new, mode="drop")

        gone = here & (onward == self.graph.end)
        column = lambda table, new: table.at[:, index].set(put(table[:, index], new))
        return Walk(
            carry=jax.tree.map(put, walk.carry, carry),
            at=put(walk.at, onward),
            output=put(walk.output, output, gone),
            exits=put(walk.exits, jnp.full_like(onward, index), gone),
            scores=column(walk.scores, score),
            visits=column(walk.visits, visits),
            rows=walk.rows.at[index].add(b if rows is None else rows.shape[0]),
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _until_all_left(traced: Traced, tree: Any, weights: Any, thresholds: Any, leaves: Any) -> Any:
    """Sweeps until nobody is left: a `Walk` as its leaves, and weights as arguments so that a derivative is noticed."""
    going = lambda walk: jnp.any(walk.at < traced.graph.end)
    sweep = lambda walk: traced._sweep(weights, thresholds, walk)
    return jax.tree.leaves(lax.while_loop(going, sweep, tree.unflatten(leaves)))


@_until_all_left.defjvp
def _no_derivative(traced: Traced, tree: Any, primals: Any, tangents: Any) -> Any:
    raise DyncompError(
        f"Traced(how={traced.how!r}): a loop that runs until all have left has no gradient; set bounded=True"
    )


class _OneProgram:
    """Runs a `Traced` network on batches of any size; each size compiles once.

    Attributes:
      compilations: programs built so far.
    """

    def __init__(self, traced: Traced):
        self.net, self._traced, self.graph = traced.net, traced, traced.graph
        self._thresholds = net_thresholds(traced.net)
        self.compilations = 0

        def counted(*args: Any) -> Walk:  # runs when it is traced: once a program
            self.compilations += 1
            return traced(*args)

        self._run = jax.jit(counted)

    @property
    def thresholds(self) -> np.ndarray:
        """float32 [s], may be set or written between calls."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Any) -> None:
        self._thresholds = full_thresholds(values, self.graph.end)

    def __call__(self, inputs: Any) -> Executed:
        """Runs a batch."""
        walk = self._run(self._traced.weights, inputs, jnp.asarray(self.thresholds))
        found = jax.device_get((walk.output, walk.exits, walk.scores, walk.visits, walk.rows))
        output, exits, scores, visits, rows = found
        prices = tuple(segment.cost for segment in self.net.segments)
        return executed(prices, self.graph, output, exits, scores, visits, rows.astype(np.int64))


class MaskedExecutor(_OneProgram):
    """Computes every segment for every example and picks afterwards: the reference."""

    def __init__(self, net: Segmented):
        super().__init__(Traced(net))


class LaxExecutor(_OneProgram):
    """Runs a segment on the whole batch where some example is there: saves at batch 1, or where all agree."""

    def __init__(self, net: Segmented):
        super().__init__(Traced(net, "lax"))


class CompactExecutor(_OneProgram):
    """Gathers the examples that are at a segment, padded to the next bucket, inside one program.

    Args:
      net: the network.
      buckets: row counts besides that of the whole batch; every one compiles every segment once more.
    """

    def __init__(self, net: Segmented, buckets: tuple[int, ...] = (1, 4, 16, 64, 256)):
        if list(buckets) != sorted(set(buckets)) or min(buckets, default=1) < 1:
            raise DyncompError(f"buckets={buckets}: give ascending row counts of at least 1")
        super().__init__(Traced(net, "compact", buckets))


def net_thresholds(net: Segmented) -> np.ndarray:
    """float32 [s], those of a network, 0 for segments that have none."""
    return full_thresholds(net.thresholds, len(net.segments))
