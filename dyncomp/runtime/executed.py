"""What an execution gives back: outputs, where each example went, and what it took."""

import dataclasses
import functools
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from dyncomp.core.aux import Count
from dyncomp.core.ledger import Cost, Ledger
from dyncomp.core.plans import ExitPlan
from dyncomp.runtime.graph import Graph


@dataclasses.dataclass(frozen=True)
class Executed:
    """Outputs in the order of the inputs, and what it took.

    Attributes:
      outputs: numpy [b ...].
      exits: int [b], the segment each example left after; ``plan`` holds the same on the device.
      scores: float32 [b s], of an example's last run of a segment, NaN where it ran none.
      visits: int [b s], how often each example ran each segment.
      executed: int64 [s], rows that ran each segment, padding and masked work included.
      prices: of each segment.
      names: of each segment.
    """

    outputs: np.ndarray
    exits: np.ndarray
    scores: np.ndarray
    visits: np.ndarray
    executed: np.ndarray
    prices: tuple[Cost, ...]
    names: tuple[str, ...]

    # Made when asked for: at small batches they would cost as much as a segment.
    @functools.cached_property
    def plan(self) -> ExitPlan:
        """Where each example left, and the scores that decided."""
        return ExitPlan(jnp.asarray(self.exits, jnp.int32), jnp.asarray(self.scores))

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """int64 [s], runs of each segment that some example needed."""
        return self.visits.sum(axis=0, dtype=np.int64)

    @functools.cached_property
    def ledger(self) -> Ledger:
        """``needed`` and ``executed`` times each segment's price."""
        pairs = zip(self.needed[:, None], self.executed[:, None], strict=True)
        counts = dict(zip(self.names, (Count(*pair) for pair in pairs), strict=True))
        return Ledger(dict(zip(self.names, self.prices, strict=True))).record(counts)


def executed(
    prices: tuple[Cost, ...],
    graph: Graph,
    outputs: np.ndarray,
    exits: np.ndarray,
    scores: np.ndarray,
    visits: np.ndarray,
    rows: np.ndarray,
) -> Executed:
    """The result, with a warning where a score was not a number: such an example did not leave there."""
    lost = np.isnan(scores)
    if lost.any():  # also where a segment was not run
        warn_of_nan(np.any(lost & (visits > 0) & graph.deciding, axis=1))
    return Executed(outputs, exits, scores, visits, rows, prices, graph.names)


def warn_of_nan(lost: Any) -> None:
    """Says how many of some examples (bool [b]) had a score that decided nothing."""
    if lost.any():
        warnings.warn(
            f"{int(lost.sum())} of {len(lost)} examples had a score that is not a number and did not leave by it",
            RuntimeWarning,
            stacklevel=4,
        )
