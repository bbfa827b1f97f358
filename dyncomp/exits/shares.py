"""Thresholds for wanted exit shares, exit by exit, and the shares that a sweep runs through.

The procedure of Dynamic Perceiver's released evaluation (arXiv 2306.11248), itself after MSDNet. Host-side numpy.
`core.budget.chain_thresholds` rounds *cumulative* shares and lets later exits make up for what an earlier one took too
much; here each exit counts its own share, rounded down.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from dyncomp.core import budget
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float

Short = Literal["take", "official"]
DAMPING = (0.85, 1.0, 0.5)
SWEEP = (
    *(round(0.05 * step, 2) for step in range(4, 21)),
    *(20 / step for step in range(20, 4, -1)),
)
"""The 33 values of p: 0.20, 0.25, ... 1, then 20/20, 20/19, ... 20/5; 1 occurs twice."""


def swept_shares(
    p: float, exits: int, damping: Sequence[float] = DAMPING
) -> Float[np.ndarray, "exits"]:
    """q_k proportional to p^k, then q_1, q_2, ... times ``damping`` in turn, the later ones scaled: all sum to 1.

    Raises:
      DyncompError: p that is not positive, or damping that leaves nothing or too much to the later exits.
    """
    shares = budget.geometric_shares(p, exits)
    for index, factor in enumerate(damping[: exits - 1]):
        shares[index] *= factor
        left = 1.0 - shares[: index + 1].sum()
        if factor < 0 or left < 0:
            raise DyncompError(f"damping={tuple(damping)}: nothing is left after exit {index + 1}")
        shares[index + 1 :] *= left / shares[index + 1 :].sum()
    return shares


def share_thresholds(
    scores: Float[np.ndarray, "b y"],
    shares: Float[np.ndarray, "x"],
    *,
    short: Short = "take",
) -> Float[np.ndarray, "y"]:
    """t_k, the floor(b q_k)-th highest score at exit k among those that have not left; who reaches it leaves.

    With distinct scores exit k < x gets exactly floor(b q_k) examples, the last one the rest. Ties leave together, so
    that fewer than floor(b q_k) may be left for a later exit.

    Args:
      scores: confidence of each early exit on calibration examples; an example leaves at the first it reaches.
      shares: wanted of each exit, the last one's too; they sum to 1.
      short: where fewer are left than wanted, ``take`` sends out all that are; ``official`` nobody (the released
        solver's threshold stays infinite, and they fall through).

    Returns:
      float64 [y]; +inf where nobody is to leave.

    Raises:
      DyncompError: shapes disagree, shares are no distribution, or NaN among the scores.
    """
    scores, shares = np.asarray(scores, np.float64), np.asarray(shares, np.float64)
    if short not in ("take", "official"):
        raise DyncompError(f"short={short!r}: use 'take' or 'official'")
    if scores.ndim != 2 or shares.shape != (scores.shape[1] + 1,) or np.isnan(scores).any():
        raise DyncompError(
            f"share_thresholds: scores {scores.shape} without NaN need {scores.shape[-1] + 1} shares,"
            f" got {shares.shape}"
        )
    if (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise DyncompError("share_thresholds: shares must be >= 0 and sum to 1")
    thresholds = np.full(scores.shape[1], np.inf)
    staying = np.ones(len(scores), bool)
    for level, share in enumerate(shares[:-1]):
        # An exact product that rounding put just below a whole number counts as that number.
        wanted = int(np.floor(len(scores) * share + 1e-9))
        here = np.sort(scores[staying, level])
        if wanted > len(here):
            wanted = len(here) if short == "take" else 0
        if wanted:
            thresholds[level] = here[-wanted]
        staying &= scores[:, level] < thresholds[level]
    return thresholds
