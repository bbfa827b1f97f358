"""One threshold for all exits, chosen on held-out data from the front of accuracy against cost (arXiv 2303.10276).

Host-side numpy. Leaving is strict, score > threshold, as in `RunningSumRule`.
"""

import dataclasses

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Bool, Float, Int

CANDIDATES = 200
"""How many quantiles of the scores are tried."""


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A threshold and what it gives on the data it was chosen on: mean cost, and the share that is right."""

    threshold: float
    cost: float
    accuracy: float


def leaves_above(scores: Float[np.ndarray, "b x"], threshold: float) -> Int[np.ndarray, "b"]:
    """The first exit whose score exceeds the threshold, else the last; a score that is no number exceeds none."""
    out = scores > threshold
    out[:, -1] = True
    return out.argmax(axis=1)


def candidates_of(scores: Float[np.ndarray, "b x"]) -> Float[np.ndarray, "n"]:
    """Quantiles of the scores that may decide, ascending; below the first all leave at once, above the last nobody."""
    deciding = scores[:, :-1]
    if deciding.size == 0 or np.isnan(deciding).any():
        raise DyncompError("a threshold needs two exits or more, and scores without NaN")
    levels = np.quantile(deciding, np.linspace(0.0, 1.0, CANDIDATES))
    return np.unique(np.concatenate([[np.nextafter(levels[0], -np.inf)], levels]))


def threshold_front(
    scores: Float[np.ndarray, "b x"],
    right: Bool[np.ndarray, "b x"],
    costs: Float[np.ndarray, "x"],
    candidates: Float[np.ndarray, "n"] | None = None,
) -> list[Chosen]:
    """Thresholds that no other one beats in both cost and accuracy, cheapest first.

    Args:
      scores: of every exit on held-out examples; the last exit's are not looked at.
      right: whether each exit's answer is.
      costs: of leaving at each exit, cumulative.
      candidates: thresholds to try; default quantiles of the scores.

    Raises:
      DyncompError: shapes disagree, or no exit decides.
    """
    if scores.shape != right.shape or costs.shape != scores.shape[1:]:
        raise DyncompError(
            f"threshold_front: scores {scores.shape}, right {right.shape}, costs {costs.shape}: give [b x], [b x], [x]"
        )
    found = []
    for threshold in candidates_of(scores) if candidates is None else candidates:
        exits = leaves_above(scores, threshold)
        accuracy = float(right[np.arange(len(exits)), exits].mean())
        found.append(Chosen(float(threshold), float(costs[exits].mean(dtype=np.float64)), accuracy))
    front: list[Chosen] = []
    for one in sorted(found, key=lambda one: (one.cost, -one.accuracy)):
        if not front or one.accuracy > front[-1].accuracy:
            front.append(one)
    return front


def cheapest_threshold(
    scores: Float[np.ndarray, "b x"],
    right: Bool[np.ndarray, "b x"],
    costs: Float[np.ndarray, "x"],
    *,
    tolerance: float = 0.0,
    candidates: Float[np.ndarray, "n"] | None = None,
) -> Chosen:
    """The cheapest threshold that loses at most ``tolerance`` of the last exit's accuracy (a share of examples).

    Where no candidate keeps it, nobody leaves early: the threshold is infinite. Arguments as in `threshold_front`.
    """
    full = float(right[:, -1].mean())
    # Shares of b examples are told apart at 1/b; sums in floating point are not.
    enough = full - tolerance - 0.5 / len(right)
    for one in threshold_front(scores, right, costs, candidates):
        if one.accuracy > enough:
            return one
    return Chosen(float("inf"), float(costs[-1]), full)


def threshold_for_cost(
    scores: Float[np.ndarray, "b x"], costs: Float[np.ndarray, "x"], mean: float
) -> float:
    """The highest candidate at which examples like these cost at most ``mean``; the lowest one where none does."""
    tried = candidates_of(scores)
    spent = np.asarray([costs[leaves_above(scores, one)].mean() for one in tried])
    fits = np.flatnonzero(spent <= mean)
    return float(tried[fits[-1] if len(fits) else 0])
