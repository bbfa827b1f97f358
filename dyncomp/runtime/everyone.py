"""A whole batch through all segments as one program, for times when nobody leaves."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dyncomp.runtime.executed import Executed, executed
from dyncomp.runtime.programs import padded
from dyncomp.runtime.whole import Whole


class Everyone(Whole):
    """Runs every segment of a chain for every example and picks afterwards; fewer rows than the program's are padded.

    The host is asked once, at the end, and the compiler sees the network whole: what exits cost where nobody takes one
    is then their heads.
    """

    def __call__(self, inputs: np.ndarray, thresholds: np.ndarray) -> Executed:
        """Runs inputs [b ...] under thresholds [s]."""
        self.warm_up()
        b = len(inputs)
        given = padded(inputs, np.arange(b), self.rows)
        found = self._call(self.flat.weights, given, thresholds)
        output, last, scores = (np.asarray(each)[:b] for each in found)
        visits = (np.arange(self.graph.end) <= last[:, None]).astype(np.int32)
        rows = np.full(self.graph.end, self.rows, np.int64)
        return executed(self.flat.prices, self.graph, output, last, scores, visits, rows)

    def _run(self, weights: Any, inputs: Any, thresholds: Any) -> tuple[Any, Any, Any]:
        """(outputs [b ...], segment each left after [b], scores [b s])."""
        end, buffer = self.graph.end, self._empty()
        last = jnp.full((self.rows,), end, jnp.int32)
        output, scores = None, []
        for index in range(end):
            buffer, new, route, score = self._segment(index, weights, buffer, inputs, thresholds)
            here = last == end
            gone = here & (self.graph.onward(index, route, 1) == end)
            pick = gone.reshape(-1, *[1] * (new.ndim - 1))
            output = new if output is None else jnp.where(pick, new, output)
            last = jnp.where(gone, index, last)
            scores.append(jnp.where(here, score.astype(jnp.float32), jnp.nan))
        return output, last, jnp.stack(scores, axis=1)
