"""A chain of segments as one program of a fixed number of rows, compiled ahead of time."""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.runtime.flat import Flat


class Whole(abc.ABC):
    """What `Alone` and `Everyone` have in common.

    Args:
      flat: the network, a chain (`Graph.chain`), whose functions are for ``rows`` slots.
      rows: of the program.
    """

    def __init__(self, flat: Flat, rows: int):
        self.flat, self.graph, self.rows = flat, flat.graph, rows
        self._call: Any = None

    @property
    def compiled(self) -> bool:
        """Whether `warm_up` or a call was."""
        return self._call is not None

    def warm_up(self) -> None:
        """Compiles the program."""
        if not self.compiled:
            segments = range(self.graph.end)
            shapes = [self.flat.arguments(index, self.rows, self.rows) for index in segments]
            thresholds = jax.ShapeDtypeStruct((self.graph.end,), jnp.float32)
            weights = [own for own, *_ in shapes]
            self._call = jax.jit(self._run).lower(weights, shapes[0][-1], thresholds).compile()

    def _segment(
        self, index: int, weights: Any, buffer: Any, inputs: Any, thresholds: Any
    ) -> tuple[Any, ...]:
        """(buffer, output, route, score) of a segment on all rows; only the first takes inputs."""
        rows, more = jnp.arange(self.rows, dtype=jnp.int32), (inputs,) if index == 0 else ()
        function = self.flat.functions[index](self.rows)
        return function(weights[index], buffer, rows, thresholds[index], *more)

    def _empty(self) -> list[Any]:
        """The buffer before the first segment."""
        return [jnp.zeros((self.rows, *leaf.shape), leaf.dtype) for leaf in self.flat.carry]

    @abc.abstractmethod
    def _run(self, weights: Any, inputs: Any, thresholds: Any) -> tuple[Any, Any, Any]:
        """The program: (outputs, segments they left after, scores)."""
