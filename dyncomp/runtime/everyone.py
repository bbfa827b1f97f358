"""A whole batch through all segments as one program, for times when nobody leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.runtime.executed import Executed, executed
from dyncomp.runtime.flat import Flat
from dyncomp.runtime.programs import padded


class Everyone:
    """Runs every segment of a chain (`Graph.chain`) for every example and picks afterwards.

    The host is asked once, at the end, and the compiler sees the network whole: what exits cost where nobody takes one
    is then their heads.

    Args:
      flat: the network, a chain.
      capacity: rows of the program; fewer are padded.
    """

    def __init__(self, flat: Flat, capacity: int):
        self.flat, self.graph, self.capacity = flat, flat.graph, capacity
        self._call: Any = None

    @property
    def compiled(self) -> bool:
        """Whether `warm_up` or a call was."""
        return self._call is not None

    def warm_up(self) -> None:
        """Compiles the program."""
        if not self.compiled:
            count, b = self.graph.end, self.capacity
            shapes = [self.flat.arguments(index, b, b) for index in range(count)]
            thresholds = jax.ShapeDtypeStruct((count,), jnp.float32)
            lowered = jax.jit(self._run).lower(
                [own for own, *_ in shapes], shapes[0][-1], thresholds
            )
            self._call = lowered.compile()

    def __call__(self, inputs: np.ndarray, thresholds: np.ndarray) -> Executed:
        """Runs inputs [b ...] under thresholds [s]."""
        self.warm_up()
        b = len(inputs)
        given = padded(inputs, np.arange(b), self.capacity)
        found = self._call(self.flat.weights, given, thresholds)
        output, last, scores = (np.asarray(each)[:b] for each in found)
        visits = (np.arange(self.graph.end) <= last[:, None]).astype(np.int32)
        rows = np.full(self.graph.end, self.capacity, np.int64)
        return executed(self.flat.prices, self.graph, output, last, scores, visits, rows)

    def _run(self, weights: Any, inputs: Any, thresholds: Any) -> tuple[Any, Any, Any]:
        """(outputs [b ...], segment each left after [b], scores [b s])."""
        b, end = self.capacity, self.graph.end
        buffer = [jnp.zeros((b, *leaf.shape), leaf.dtype) for leaf in self.flat.carry]
        rows, last = jnp.arange(b, dtype=jnp.int32), jnp.full((b,), end, jnp.int32)
        output, scores = None, []
        for index in range(end):
            more = (inputs,) if index == 0 else ()
            function = self.flat.functions[index](b)
            buffer, new, route, score = function(
                weights[index], buffer, rows, thresholds[index], *more
            )
            here = last == end
            gone = here & (self.graph.onward(index, route, 1) == end)
            pick = gone.reshape(-1, *[1] * (new.ndim - 1))
            output = new if output is None else jnp.where(pick, new, output)
            last = jnp.where(gone, index, last)
            scores.append(jnp.where(here, score.astype(jnp.float32), jnp.nan))
        return output, last, jnp.stack(scores, axis=1)
