"""Thresholds for a budget: of mean compute, of the most that any example may take, and of memory.

Solved on a calibration split, applied as run-time arguments. A threshold only holds its budget on examples like those
of the split: somebody who makes exits unsure gets more. `deepest_exit` and `leaves_within` bound what he can get.
Host-side numpy.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from dyncomp.core import budget
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int
from dyncomp.exits.shares import share_thresholds

Shape = Literal["quantile", "geometric", "official"]
STEPS = 60
"""Bisections: as far as float64 tells apart."""

NOBODY = 1e8
"""The released DeeR-VLA's bound for an exit that nobody takes."""


def leaves_at(
    scores: Float[np.ndarray, "b y"], thresholds: Float[np.ndarray, "y"]
) -> Int[np.ndarray, "b"]:
    """The first exit whose score reaches its threshold, else the last (y); a score that is no number reaches none."""
    reached = np.concatenate([scores >= thresholds, np.ones((len(scores), 1), bool)], axis=1)
    return reached.argmax(axis=1)


def leaves_within(
    scores: Float[np.ndarray, "b y"],
    thresholds: Float[np.ndarray, "y"],
    quota: Float[np.ndarray, "y"],
) -> Int[np.ndarray, "b"]:
    """As `leaves_at`, but of a batch of b no more than floor(quota[l] b) go on past exit l.

    Where more would, the least sure go on and the others leave; a score that is no number counts as sure. So a batch
    costs at most `most_within`, whatever its images are. Who leaves depends on the batch: for executors that see all
    of it at once.
    """
    scores = np.asarray(scores)
    b, y = scores.shape
    exits, inside = np.full(b, y), np.arange(b)
    for index in range(y):
        own = scores[inside, index]
        staying = inside[~(own >= thresholds[index])]
        order = np.argsort(scores[staying, index], kind="stable")
        going = staying[order[: int(np.floor(quota[index] * b + 1e-9))]]
        exits[np.setdiff1d(inside, going)] = index
        inside = going
    return exits


def quota_of(exits: Int[np.ndarray, "b"], early: int, slack: float = 1.0) -> Float[np.ndarray, "y"]:
    """``slack`` times the share of these examples that goes past each of ``early`` exits, at most 1."""
    past = np.asarray(exits)[:, None] > np.arange(early)
    return np.minimum(slack * past.mean(axis=0), 1.0)


def most_within(costs: Float[np.ndarray, "x"], quota: Float[np.ndarray, "y"]) -> float:
    """The largest mean cost of a batch under a quota: c_0 + sum_l min_(m <= l) quota_m (c_(l+1) - c_l)."""
    costs = np.asarray(costs, np.float64)
    return float(costs[0] + np.sum(np.minimum.accumulate(quota) * np.diff(costs)))


def deepest_exit(
    costs: Float[np.ndarray, "x"],
    peak: float | None = None,
    resident: Float[np.ndarray, "x"] | None = None,
    memory: float | None = None,
) -> int:
    """The last exit that no example takes more than ``peak`` and no more than ``memory`` to reach.

    Args:
      costs: of leaving at each exit, cumulative.
      peak: in units of ``costs``; None for no bound.
      resident: memory that must be there to reach each exit, cumulative.
      memory: in units of ``resident``; None for no bound.

    Raises:
      DyncompError: not even the first exit fits, or ``memory`` without ``resident``.
    """
    fits = np.ones(len(costs), bool) if peak is None else np.asarray(costs) <= peak
    if memory is not None:
        if resident is None:
            raise DyncompError("memory: give resident, what each exit needs, too")
        fits &= np.asarray(resident) <= memory
    if not fits[0]:
        raise DyncompError(
            f"peak={peak}, memory={memory}: not even the first exit fits; raise them"
        )
    return int(np.flatnonzero(fits)[-1])


def solve_thresholds(
    scores: Float[np.ndarray, "b y"],
    costs: Float[np.ndarray, "x"],
    mean: float,
    *,
    peak: float | None = None,
    resident: Float[np.ndarray, "x"] | None = None,
    memory: float | None = None,
    shape: Shape = "quantile",
) -> Float[np.ndarray, "y"]:
    """Thresholds under which examples like these cost ``mean`` on average, at most, and nobody exceeds a bound.

    ``quantile`` puts every threshold at the same quantile of its own exit's scores: each rises with the budget.
    ``geometric`` sends out shares proportional to r^l (MSDNet, Huang et al. 2018; DeeR-VLA, arXiv 2411.02359), where r
    meets the mean; there a deeper threshold may fall while an earlier one rises. ``official`` is the same as DeeR-VLA's
    code has it: r follows from the costs alone (`ratio_for_mean`), and shares are rounded down (`floor_thresholds`).

    Args:
      scores: of every exit on every calibration example; higher leaves first.
      costs: of leaving at each exit, cumulative, the final classifier's last.
      mean: in units of ``costs``.
      peak, resident, memory: see `deepest_exit`; all leave at the deepest exit that they allow.
      shape: see above.

    Returns:
      float64 [y]; +inf where nobody leaves, -inf at the deepest exit.

    Raises:
      DyncompError: unknown ``shape``, shapes disagree, NaN among the scores, or a mean below the first exit's cost.
    """
    scores, costs = _checked(scores, costs, shape)
    last = deepest_exit(costs, peak, resident, memory)
    if mean < costs[0]:
        raise DyncompError(f"mean={mean} is below the first exit's cost, {costs[0]}; raise it")
    thresholds = np.full(scores.shape[1], -np.inf)
    thresholds[:last] = np.inf
    if last == 0 or mean >= costs[last]:
        return thresholds
    if shape == "official":
        shares = budget.geometric_shares(ratio_for_mean(costs[: last + 1], mean), last + 1)
        thresholds[:last] = floor_thresholds(scores[:, :last], shares)
        return thresholds
    # From everyone out at once (0) to nobody before the deepest (1).
    at = (_quantiles if shape == "quantile" else _geometric)(scores[:, :last], costs[: last + 1])

    def spent(level: float) -> float:
        thresholds[:last] = at(level)
        return float(costs[leaves_at(scores, thresholds)].mean())

    low, high = 0.0, 1.0
    for _ in range(STEPS):
        level = (low + high) / 2
        low, high = (level, high) if spent(level) <= mean else (low, level)
    spent(low)
    return thresholds


def _checked(scores: Any, costs: Any, shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, or a refusal."""
    if shape not in ("quantile", "geometric", "official"):
        raise DyncompError(f"shape={shape!r}: use 'quantile', 'geometric' or 'official'")
    scores, costs = np.asarray(scores, np.float64), np.asarray(costs, np.float64)
    if scores.ndim != 2 or costs.shape != (scores.shape[1] + 1,) or np.isnan(scores).any():
        raise DyncompError(
            f"solve_thresholds: scores {scores.shape} without NaN need {scores.shape[-1] + 1} costs, got {costs.shape}"
        )
    return scores, costs


def _quantiles(
    scores: Float[np.ndarray, "b y"], costs: Float[np.ndarray, "x"]
) -> Callable[[float], Float[np.ndarray, "y"]]:
    ordered = np.concatenate([np.sort(scores, axis=0), np.full((1, scores.shape[1]), np.inf)])
    return lambda level: ordered[int(level * len(scores))]


def _geometric(
    scores: Float[np.ndarray, "b y"], costs: Float[np.ndarray, "x"]
) -> Callable[[float], Float[np.ndarray, "y"]]:
    def at(level: float) -> Float[np.ndarray, "y"]:
        if level == 0.0:
            return np.full(scores.shape[1], -np.inf)
        ratio = max(level, 1e-12) / max(1.0 - level, 1e-12)
        shares = budget.geometric_shares(ratio, len(costs))
        return budget.chain_thresholds(scores, shares)

    return at


def ratio_for_mean(costs: Float[np.ndarray, "x"], mean: float) -> float:
    """The r at which shares proportional to r^l, l = 1..x, cost ``mean`` on average (DeeR-VLA's budget equation).

    r = 1 makes all exits equally frequent; it may exceed 1.

    Raises:
      DyncompError: a mean that is not between the first and the last cost.
    """
    if not costs[0] < mean < costs[-1]:
        raise DyncompError(f"mean={mean}: use a value between {costs[0]} and {costs[-1]}")
    low, high = 0.0, 1.0  # of r / (1 + r)
    for _ in range(STEPS):
        level = (low + high) / 2
        ratio = max(level, 1e-12) / max(1.0 - level, 1e-12)
        spent = float(budget.geometric_shares(ratio, len(costs)) @ costs)
        low, high = (level, high) if spent <= mean else (low, level)
    return low / (1.0 - low)


def floor_thresholds(
    scores: Float[np.ndarray, "b y"], shares: Float[np.ndarray, "x"]
) -> Float[np.ndarray, "y"]:
    """Thresholds of a chain of exits, each of which takes floor(b q) examples (DeeR-VLA's released code).

    `share_thresholds` in its ``official`` form, with `NOBODY` where nobody is to leave, or fewer are left than should.
    The final exit takes the rest, at least its own share.

    Args:
      scores: of every exit before the final one; an example leaves at the first whose score reaches its threshold.
      shares: q of each exit, the final one last; sums to 1.

    Raises:
      DyncompError: shapes disagree, or shares that are no distribution.
    """
    found = share_thresholds(scores, shares, short="official")
    return np.where(np.isinf(found), NOBODY, found)
