"""One example at a time: a chain of segments as one program, with a branch after each that decides."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from dyncomp.runtime.executed import Executed, executed
from dyncomp.runtime.flat import Flat
from dyncomp.runtime.whole import Whole


class Alone(Whole):
    """Runs single examples through a chain (`Graph.chain`): the branch that goes on holds all that follows.

    So nothing is kept up to date between segments, as in loops over any graph, and the host is not asked, which for one
    example takes as long as a good part of a segment.

    Args:
      flat: the network, a chain, whose functions are for one slot.
    """

    def __init__(self, flat: Flat):
        super().__init__(flat, 1)

    def __call__(self, inputs: np.ndarray, thresholds: np.ndarray) -> Executed:
        """Runs inputs [1 ...] under thresholds [s]."""
        self.warm_up()
        output, last, scores = map(np.asarray, self._call(self.flat.weights, inputs, thresholds))
        visits = (np.arange(self.graph.end) <= last).astype(np.int32)
        return executed(
            self.flat.prices,
            self.graph,
            output,
            np.full(1, last, np.int32),
            scores[None],
            visits[None],
            visits.astype(np.int64),
        )

    def _run(self, weights: Any, inputs: Any, thresholds: Any) -> tuple[Any, Any, Any]:
        """(output [1 ...], segment it left after, scores [s])."""

        def begin(index: int, buffer: Any, scores: tuple[Any, ...]) -> Any:
            buffer, output, route, score = self._segment(index, weights, buffer, inputs, thresholds)
            scores = (*scores, score.astype(jnp.float32))

            def done() -> Any:
                rest = jnp.full(self.graph.end - len(scores), jnp.nan, jnp.float32)
                return output, jnp.int32(index), jnp.concatenate([*scores, rest])

            onward = lambda: begin(index + 1, buffer, scores)
            if self.graph.ends(index):
                return done()
            if not self.graph.decides(index):
                return onward()
            leaves = self.graph.onward(index, route, 1)[0] == self.graph.end
            return lax.cond(leaves, done, onward)

        return begin(0, self._empty(), ())
