"""Thresholds of a multi-exit policy for a budget: solved on held-out demonstrations, perhaps refined by acting."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float
from dyncomp.exits.budgets import Shape, solve_thresholds
from dyncomp.exits.controllers import Forward, batches

Acquisition = Literal["lcb", "ei"]


def middle_steps(
    scores: Float[Array | np.ndarray, "b t y"], mask: Float[Array | np.ndarray, "b t"]
) -> Float[np.ndarray, "n y"]:
    """Scores at the steps H/2 - 1 .. H - 2 (from 0) of windows of H: enough history, and never the last step.

    Args:
      scores: of every exit but the last.
      mask: steps that are none are left out.
    """
    window = scores.shape[1]
    part = slice(window // 2 - 1, window - 1)
    return np.asarray(scores)[:, part][np.asarray(mask)[:, part] > 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetThresholds:
    """Controller that sets the control ``thresholds`` from the calibration split.

    Reads ``deltas`` [b t y], scores behind histories of drawn exits without dropout, and ``costs`` [x] of a
    `models.MultiExitPolicy`.

    Attributes:
      mean: wanted mean cost, in units of ``costs`` (running everything is 1; a policy's are shares of its blocks).
      peak, shape: see `solve_thresholds`.
      batch_size: windows at once.
    """

    mean: float
    peak: float | None = None
    shape: Shape = "official"
    batch_size: int = 200

    def __post_init__(self):
        if not 0 < self.mean <= 1 or self.batch_size < 1:
            raise DyncompError(
                f"BudgetThresholds: mean={self.mean}, batch_size={self.batch_size}; use 0 < mean <= 1 and >= 1"
            )

    def init(self, state: Any) -> None:
        """It remembers nothing."""

    def __call__(self, state: Any, forward: Forward, task: Any, step: int) -> Any:
        """The state with thresholds that meet the budget on the calibration split."""
        found, costs = [], None
        for output, batch, _ in batches(forward, task, self.batch_size, "calibration"):
            found.append(middle_steps(output["deltas"], batch["mask"]))
            costs = np.asarray(output["costs"], np.float64)
        assert costs is not None
        scores = np.concatenate(found).astype(np.float64)
        solved = solve_thresholds(scores, costs, self.mean, peak=self.peak, shape=self.shape)
        thresholds = jnp.asarray(solved, jnp.float32)
        return state.replace(controls={**state.controls, "thresholds": thresholds})


def refine_thresholds(
    start: Float[np.ndarray, "y"],
    spans: Float[np.ndarray, "y"],
    worth: Callable[[Float[np.ndarray, "y"]], float],
    *,
    calls: int = 20,
    first: int = 5,
    acquisition: Acquisition = "ei",
    seed: int = 0,
) -> Float[np.ndarray, "y"]:
    """Bayesian optimisation of thresholds around a solution (DeeR-VLA's online variant).

    A Gaussian process (Matern 5/2 and noise, scikit-learn's) models what thresholds are worth, in units of their spans.
    The first call tries ``start``, the next ones points of a Latin hypercube, the others where the acquisition is
    largest among 2,000 random points. Only thresholds with a finite span move.

    Args:
      start: the offline solution.
      spans: how far each may move up and down (0.02 for the first exit and 0.002 for the others in the paper).
      worth: to be maximised, e.g. success minus 1.0 times what the mean cost exceeds the budget by.
      calls: of ``worth``, the first ones included.
      first: calls before the model decides.
      acquisition: "ei", expected improvement, or "lcb", mean plus 1.96 standard deviations (the lower bound of what
        is minimised).
      seed: of all draws.

    Returns:
      The thresholds that were worth most, ``start`` where nothing was better.

    Raises:
      DyncompError: unknown ``acquisition``, or fewer calls than first ones.
    """
    if acquisition not in ("ei", "lcb") or not 1 <= first <= calls:
        raise DyncompError(
            f"refine_thresholds: acquisition={acquisition!r}, first={first}, calls={calls}; use 'ei' or 'lcb', and"
            " 1 <= first <= calls"
        )
    from scipy.stats import qmc

    y, rng = len(start), np.random.default_rng(seed)
    plan = np.concatenate([np.zeros((1, y)), 2 * qmc.LatinHypercube(y, rng=rng).random(first) - 1])
    tried, values = np.zeros((0, y)), []
    for call in range(calls):
        point = plan[call] if call < first else _next(tried, np.asarray(values), acquisition, rng)
        tried = np.concatenate([tried, point[None]])
        values.append(worth(start + spans * point))
    return start + spans * tried[int(np.argmax(values))]


def _next(
    tried: np.ndarray, values: np.ndarray, acquisition: Acquisition, rng: np.random.Generator
) -> np.ndarray:
    """Where to try next, in -1..1."""
    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    kernel = Matern(0.5, (0.05, 5.0), nu=2.5) + WhiteKernel(0.1, (1e-3, 1.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():  # a fitted length or noise may well lie at its bound
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(tried, values)
    points = rng.uniform(-1.0, 1.0, (2000, tried.shape[1]))
    said: Any = model.predict(points, return_std=True)
    mean, deviation = said
    if acquisition == "lcb":
        return points[int(np.argmax(mean + 1.96 * deviation))]
    gain = mean - values.max()
    z = gain / np.maximum(deviation, 1e-12)
    return points[int(np.argmax(gain * norm.cdf(z) + deviation * norm.pdf(z)))]
