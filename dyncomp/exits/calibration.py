"""Calibration: error of probabilities, conformal prediction sets, and thresholds for a wanted exit histogram.

Host-side numpy on held-out outputs; nothing here ever sees test labels except to report.
"""

import numpy as np

from dyncomp.core import budget
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Bool, Float, Int


def ece(
    probabilities: Float[np.ndarray, "b c"], labels: Int[np.ndarray, "b"], bins: int = 15
) -> float:
    """Expected calibration error of the top class: sum over equal-width bins of share |accuracy - confidence|.

    Naeini et al. 2015; bins are (lower, upper], as in Guo et al. 2017.
    """
    top = probabilities.max(axis=-1).astype(np.float64)
    right = (probabilities.argmax(axis=-1) == labels).astype(np.float64)
    place = np.clip(np.ceil(top * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=right - top, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def brier(probabilities: Float[np.ndarray, "b c"], labels: Int[np.ndarray, "b"]) -> float:
    """Mean over examples of the squared distance to the one-hot label, summed over classes (0 .. 2)."""
    wide = probabilities.astype(np.float64).copy()
    wide[np.arange(len(labels)), labels] -= 1.0
    return float(np.square(wide).sum(axis=-1).mean())


def conformal_quantile(scores: Float[np.ndarray, "n"], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest score; infinity when there are too few (split conformal)."""
    rank = int(np.ceil((len(scores) + 1) * (1.0 - alpha)))
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else float("inf")


def conformal_thresholds(
    probabilities: Float[np.ndarray, "x b c"],
    labels: Int[np.ndarray, "b"],
    exits: Int[np.ndarray, "b"],
    alpha: float,
    *,
    enough: int = 20,
) -> Float[np.ndarray, "x"]:
    """One threshold an exit on the score 1 - p(label), from validation data (JEI-DNN's uncertainty add-on).

    An exit at which more than ``enough`` examples left uses those; any other uses its scores on all examples.

    Args:
      probabilities: of every exit on every validation example.
      exits: where each validation example left.
      alpha: wanted miss rate, in (0, 1).
    """
    if not 0.0 < alpha < 1.0:
        raise DyncompError(f"alpha={alpha}: give a miss rate between 0 and 1")
    scores = 1.0 - probabilities[:, np.arange(len(labels)), labels]
    chosen = []
    for index, row in enumerate(scores):
        here = exits == index
        chosen.append(conformal_quantile(row[here] if here.sum() > enough else row, alpha))
    return np.asarray(chosen)


def prediction_sets(
    probabilities: Float[np.ndarray, "x b c"],
    exits: Int[np.ndarray, "b"],
    thresholds: Float[np.ndarray, "x"],
) -> Bool[np.ndarray, "b c"]:
    """Classes whose score 1 - p, at the exit that fired, is within that exit's threshold."""
    emitted = probabilities[exits, np.arange(len(exits))]
    return (1.0 - emitted) <= thresholds[exits][:, None]


def coverage(sets: Bool[np.ndarray, "b c"], labels: Int[np.ndarray, "b"]) -> float:
    """Share of examples whose set holds their label."""
    return float(sets[np.arange(len(labels)), labels].mean())


def chain_thresholds(
    scores: Float[np.ndarray, "y b"], target: Float[np.ndarray, "x"]
) -> Float[np.ndarray, "y"]:
    """Thresholds at which a share ``target[l]`` of all examples leaves at exit l, those that left before excluded.

    Exit by exit: of the examples still in, the ones with the highest scores leave. The threshold is the lowest
    score that leaves, +inf when none should; ties at it leave together.

    Args:
      scores: confidence of every exit on every calibration example (higher leaves first).
      target: wanted share of each exit; sums to 1 with the final classifier.

    Raises:
      DyncompError: shares that are negative or do not sum to 1, or scores for another number of exits.
    """
    return budget.chain_thresholds(scores.T, target)
