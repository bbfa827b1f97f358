"""Budgets: pure functions that hold mean compute at a target (a loss, a dual variable, or calibrated thresholds)."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float


def target_loss(
    usage: Float[Array, ""], target: float, *, kind: Literal["squared", "hinge"] = "squared"
) -> Float[Array, ""]:
    """Distance of mean usage to a target: (u - t)^2, or max(u - t, 0), which lets usage fall below.

    Raises:
      DyncompError: unknown ``kind``.
    """
    if kind not in ("squared", "hinge"):
        raise DyncompError(f"target_loss kind={kind!r}: use 'squared' or 'hinge'")
    excess = usage - jnp.float32(target)
    return jnp.square(excess) if kind == "squared" else jnp.maximum(excess, 0.0)


def dual_ascent(
    dual: Float[Array, ""], usage: Float[Array, ""], target: float, lr: float
) -> Float[Array, ""]:
    """One step on the multiplier of ``usage <= target``, projected on dual >= 0."""
    return jnp.maximum(dual + jnp.float32(lr) * (usage - jnp.float32(target)), 0.0)


def quantile_threshold(scores: np.ndarray, share: float) -> float:
    """The threshold that ``round(share * len(scores))`` scores pass by ``score >= threshold`` (more where tied).

    Returns infinity when none may pass.

    Raises:
      DyncompError: share outside [0, 1], no scores, or NaN among them.
    """
    scores = np.asarray(scores, np.float64).reshape(-1)
    if not 0 <= share <= 1 or scores.size == 0 or np.isnan(scores).any():
        raise DyncompError(
            f"quantile_threshold: need 0 <= share <= 1 and numbers, got {share} of {scores.size} scores"
        )
    passing = round(share * scores.size)
    return float(np.sort(scores)[scores.size - passing]) if passing else float("inf")


def geometric_shares(q: float, num_exits: int) -> np.ndarray:
    """Target share of each exit proportional to q^k, k = 1..num_exits (MSDNet, Huang et al. 2018, sec. 4)."""
    if q <= 0 or num_exits < 1:
        raise DyncompError(f"geometric_shares: need q > 0 and exits >= 1, got {q}, {num_exits}")
    weights = float(q) ** np.arange(1, num_exits + 1, dtype=np.float64)
    return weights / weights.sum()


def chain_thresholds(scores: np.ndarray, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Thresholds of a chain of exits that send the given share of a calibration split out at each.

    Args:
      scores: float [b y], confidence at each exit before the final one; an example leaves at the first exit whose
        score is at least the threshold.
      shares: [y + 1] target share of each exit, the final one last; sums to 1.

    Returns:
      float64 [y]. Counts are exact up to rounding of cumulative shares, where scores are distinct.

    Raises:
      DyncompError: shapes disagree, shares are no distribution, or NaN among the scores.
    """
    scores, shares = np.asarray(scores, np.float64), np.asarray(shares, np.float64)
    if scores.ndim != 2 or shares.shape != (scores.shape[1] + 1,):
        raise DyncompError(
            f"chain_thresholds: scores {scores.shape} need {scores.shape[-1] + 1} shares, got {shares.shape}"
        )
    if np.isnan(scores).any() or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise DyncompError("chain_thresholds: shares must be >= 0 and sum to 1, scores numbers")
    gone = np.round(np.cumsum(shares) * scores.shape[0]).astype(int)
    staying = np.ones(scores.shape[0], bool)
    thresholds = np.full(scores.shape[1], np.inf)
    for level in range(scores.shape[1]):
        left = int(gone[level]) - int((~staying).sum())
        here = np.sort(scores[staying, level])
        if left > 0 and here.size:
            thresholds[level] = here[max(here.size - left, 0)]
        staying &= scores[:, level] < thresholds[level]
    return thresholds
