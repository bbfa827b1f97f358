"""A budget for solvers: the tolerance at which inputs take so many evaluations on average."""

from collections.abc import Callable

import numpy as np

from dyncomp.core.errors import DyncompError


def tolerance_for(
    needed: Callable[[float], float],
    budget: float,
    *,
    low: float = 1e-7,
    high: float = 1.0,
    steps: int = 10,
) -> float:
    """The smallest tolerance found whose mean number of evaluations is within a budget, by bisection of its logarithm.

    Tolerances are run-time arguments, so ``needed`` compiles once.

    Args:
      needed: mean evaluations of calibration data at a tolerance; falls as the tolerance grows.
      budget: evaluations.
      low, high: where to look.
      steps: halvings.

    Raises:
      DyncompError: even ``high`` takes more.
    """
    if not 0 < low < high or steps < 1:
        raise DyncompError(f"tolerance_for: low={low}, high={high}: use 0 < low < high, steps >= 1")
    if (least := needed(high)) > budget:
        raise DyncompError(
            f"a budget of {budget:g} evaluations: even tolerance {high:g} takes {least:g}"
        )
    bottom, top = np.log(low), np.log(high)
    for _ in range(steps):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if needed(float(np.exp(middle))) > budget else (bottom, middle)
    return float(np.exp(top))
