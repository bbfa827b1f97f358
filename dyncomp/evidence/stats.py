"""Paired statistics over a few seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from dyncomp.core.errors import DyncompError
from dyncomp.evidence.claims import Claim

Figures = Mapping[str, Mapping[str, float]]
"""What one seed found: arm -> metric -> value."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean of n numbers and its two-sided 95% interval (None where n < 2 leaves it open)."""

    mean: float
    interval: tuple[float, float] | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval by Student's t with n - 1 degrees of freedom.

    Raises:
      DyncompError: no values, or one that is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise DyncompError(f"no mean of {list(values)}: every seed must give a finite figure")
    from scipy.stats import t

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, None, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = float(t.ppf(0.975, n - 1)) * math.sqrt(variance / n)
    return Estimate(mean, (mean - half, mean + half), n)


def difference(claim: Claim, figures: Figures, compute: str | None = None) -> float:
    """What one seed says about a claim: the arm's figure minus what it is compared with.

    Raises:
      DyncompError: a figure is missing, or the two arms of a line have the same compute.
    """
    get = lambda arm, metric: _figure(claim, figures, arm, metric)
    own = get(claim.arm, claim.metric)
    if claim.form == "zero":
        return own
    others = [get(arm, claim.metric) for arm in claim.others]
    if claim.form == "trend":
        steps = [b - a for a, b in zip([own, *others], others, strict=False)]
        return max(steps) if claim.relation in ("<", "<=") else min(steps)
    if claim.form == "line":
        axis = claim.compute or compute or ""
        at, left, right = (get(arm, axis) for arm in (claim.arm, *claim.others))
        if left == right:
            raise DyncompError(f"claim {claim.id!r}: both arms of the line have {axis} = {left:g}")
        return own - (others[0] + (others[1] - others[0]) * (at - left) / (right - left))
    return own - others[0]


def _figure(claim: Claim, figures: Figures, arm: str, metric: str) -> float:
    try:
        return float(figures[arm][metric])
    except KeyError:
        raise DyncompError(
            f"claim {claim.id!r} needs {metric!r} of arm {arm!r}, which run_seed did not return"
        ) from None


def holds(relation: str, margin: float, found: Estimate, needed: int = 2) -> bool | str | None:
    """True or False where the whole interval lies on one side of the margin, else "unresolved"; None for "report".

    Args:
      relation: of the mean to the margin.
      margin: the margin.
      found: mean and interval of the differences.
      needed: fewer seeds than this resolve nothing.
    """
    if relation == "report":
        return None
    if found.interval is None or found.n < needed:
        return "unresolved"
    low, high = found.interval
    if relation in (">", ">="):  # a > m is the same as -a < -m
        low, high, margin, relation = -high, -low, -margin, relation.replace(">", "<")
    yes, no = (high < margin, low >= margin) if relation == "<" else (high <= margin, low > margin)
    return True if yes else False if no else "unresolved"
