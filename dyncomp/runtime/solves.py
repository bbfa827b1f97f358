"""Solvers as loops of segments: every trip takes a few steps, and examples that have arrived leave the batch.

Under `jax.vmap` a loop runs until the slowest example has ended, on all rows. Here the loop is a segment that leads
back to itself, so executors that compact run it on those examples only that still have a way to go.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Variables
from dyncomp.recurrent import adaptive
from dyncomp.recurrent.adaptive import StepControl
from dyncomp.recurrent.fixed_point import residual
from dyncomp.recurrent.ode import ODESolver
from dyncomp.recurrent.tableau import TABLEAUS
from dyncomp.runtime.executed import Executed
from dyncomp.runtime.segments import END, FREE, Segment, Segmented


@dataclasses.dataclass(frozen=True)
class Solved:
    """Answers of a batch that executors solved, and what they took.

    Attributes:
      outputs: [b ...].
      needed: int [b], evaluations of f that the example's own steps take.
      finished: bool [b]; the others ran out of trips, and their outputs are states on the way.
      executed: evaluations that the device made, rows times evaluations, padding and frozen steps included.
    """

    outputs: np.ndarray
    needed: np.ndarray
    finished: np.ndarray
    executed: int


@dataclasses.dataclass(frozen=True)
class SolveSegments:
    """A network with a solve in its middle, for the executors.

    All ``thresholds`` are the tolerance, a run-time value: write ``executor.thresholds[:]``.

    Attributes:
      net: segments "start", "steps" (leads back to itself) and "answer".
      shape: of one answer.
      start, trip: evaluations of f of one row in "start" and in one trip of "steps".
    """

    net: Segmented
    shape: tuple[int, ...]
    start: int
    trip: int

    def read(self, found: Executed) -> Solved:
        """What an executor gave back."""
        outputs, tail = np.split(found.outputs, [-2], axis=1)
        rows = found.executed
        return Solved(
            outputs=outputs.reshape(-1, *self.shape),
            needed=tail[:, 0].astype(np.int64),
            finished=tail[:, 1] > 0,
            executed=int(rows[0]) * self.start + int(rows[1]) * self.trip,
        )


def ode_segments(
    field: Callable[[Any, Any, Any], Any],
    weights: Any,
    shape: tuple[int, ...],
    *,
    solver: str = "tsit5",
    control: StepControl | None = None,
    tolerance: float = 1e-3,
    t1: float = 1.0,
    max_steps: int = 256,
    attempts: int = 1,
    before: Callable[[Any, Any], Any] | None = None,
    after: Callable[[Any, Any], Any] | None = None,
    prices: tuple[Cost, Cost, Cost, Cost] = (FREE, FREE, FREE, FREE),
) -> SolveSegments:
    """dz/dt = f from 0 to t1, adaptively, every example with steps of its own.

    Slopes are kept between trips, so nothing is evaluated twice: an example needs 1 evaluation at the start (2 where
    the first step is estimated) and ``fresh`` for every attempt.

    Args:
      field: ``(weights, t [b], z) -> dz/dt``; z is what ``before`` gives, alike for all of f's inputs: a field that
        needs more of an example reads it from channels of z whose slope is zero.
      weights: pytree, given to all three functions.
      shape: of one answer.
      solver: "tsit5" or "dopri5".
      control: of the steps; default, an I controller.
      tolerance: rtol; float32.
      t1: static.
      max_steps: attempts at most; rounded up to whole trips.
      attempts: attempted steps of a trip. More mean fewer launches, and rows that stand still at the end of a solve.
      before: ``(weights, inputs) -> z [b ...]``; default, the inputs.
      after: ``(weights, z) -> answer [b ...]``; default z.
      prices: of ``before``, of an evaluation, of the arithmetic of an attempt, and of ``after``, for one example.
    """
    if solver not in ("tsit5", "dopri5") or attempts < 1 or max_steps < 1:
        raise DyncompError(
            f"solver={solver!r}: use tsit5 or dopri5, with max_steps and attempts >= 1"
        )
    control = control or StepControl()
    tableau, starting = TABLEAUS[solver], 1 if control.first_step else 2

    trip = attempts * tableau.fresh
    costs = (
        prices[0] + prices[1] * starting,
        prices[1] * trip + prices[2] * attempts,
        prices[3],
    )
    trips = -(-max_steps // attempts)
    parts = _ode_parts(field, before, after, (tableau, control, t1, attempts))
    return SolveSegments(_looped(weights, parts, costs, tolerance, trips), shape, starting, trip)


def _ode_parts(
    field: Callable[[Any, Any, Any], Any],
    before: Callable[[Any, Any], Any] | None,
    after: Callable[[Any, Any], Any] | None,
    how: tuple[Any, StepControl, float, int],
) -> tuple[Callable, Callable, Callable, Callable, Callable]:
    """What the loop of `ode_segments` is made of; ``how``: tableau, control, t1, attempts of a trip."""
    tableau, control, t1, attempts = how

    def begin(weights: Any, inputs: Any) -> adaptive.Progress:
        z = before(weights, inputs) if before else inputs
        return adaptive.blank(z)

    def first(weights: Any, at: adaptive.Progress, tolerance: Any) -> adaptive.Progress:
        f = lambda t, z: field(weights, t, z)
        return adaptive.begin(f, at.z, 0.0, t1, control, tolerance, tableau.order)

    def step(weights: Any, at: adaptive.Progress, tolerance: Any) -> Any:
        f = lambda t, z: field(weights, t, z)
        for _ in range(attempts):
            at = adaptive.attempt(f, at, t1, tableau, control, tolerance)
        return at

    def answer(weights: Any, at: adaptive.Progress, tolerance: Any) -> tuple[Any, Any, Any]:
        z = after(weights, at.z) if after else at.z
        return z, adaptive.evaluations(at, tableau, control), adaptive.done(at, t1)

    return begin, first, step, lambda at, tolerance: (adaptive.done(at, t1), at.t), answer


def fixed_point_segments(
    step: Callable[[Any, Any, Any], Any],
    weights: Any,
    shape: tuple[int, ...],
    *,
    before: Callable[[Any, Any], tuple[Any, Any]],
    after: Callable[[Any, Any], Any] | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 64,
    iterations: int = 4,
    prices: tuple[Cost, Cost, Cost] = (FREE, FREE, FREE),
) -> SolveSegments:
    """z = f(z) by plain iteration, every example until its residual is within the tolerance.

    Args:
      step: ``(weights, given, z) -> f(z)``.
      weights: pytree, given to all functions.
      shape: of one answer.
      before: ``(weights, inputs) -> (given, z)``, leaves with a batch axis.
      after: ``(weights, z) -> answer``; default z.
      tolerance: of the residual (`recurrent.residual`).
      max_steps: evaluations at most, rounded up to whole trips.
      iterations: evaluations of a trip.
      prices: of ``before``, of an evaluation and of ``after``, for one example.
    """

    def begin(weights: Any, inputs: Any) -> Any:
        given, z = before(weights, inputs)
        return {"given": given, "z": z, "image": z, "runs": jnp.zeros(z.shape[:1], jnp.int32)}

    def first(weights: Any, at: Any, tolerance: Any) -> Any:
        image = step(weights, at["given"], at["z"])
        return {**at, "image": image, "runs": at["runs"] + 1}

    def more(weights: Any, at: Any, tolerance: Any) -> Any:
        for _ in range(iterations):
            going = residual(at["z"], at["image"]) > tolerance
            wide = going.reshape(-1, *[1] * (at["z"].ndim - 1))
            z = jnp.where(wide, at["image"], at["z"])
            image = jnp.where(wide, step(weights, at["given"], z), at["image"])
            at = {**at, "z": z, "image": image, "runs": at["runs"] + going}
        return at

    def arrived(at: Any, tolerance: Any) -> tuple[Array, Array]:
        left = residual(at["z"], at["image"])
        return left <= tolerance, left

    def answer(weights: Any, at: Any, tolerance: Any) -> tuple[Any, Any, Any]:
        z = after(weights, at["z"]) if after else at["z"]
        return z, at["runs"], arrived(at, tolerance)[0]

    costs = (prices[0] + prices[1], prices[1] * iterations, prices[2])
    trips = -(-max_steps // iterations)
    parts = begin, first, more, arrived, answer
    return SolveSegments(_looped(weights, parts, costs, tolerance, trips), shape, 1, iterations)


def _looped(
    weights: Any, parts: tuple[Callable, ...], costs: tuple[Cost, ...], tolerance: float, trips: int
) -> Segmented:
    """Segment start, then steps until an example has arrived, then answer, which packs all into one array."""
    begin, first, step, arrived, answer = parts

    def packed(weights: Any, at: Any, tolerance: Any) -> Array:
        z, runs, finished = answer(weights, at, tolerance)
        tail = jnp.stack([runs.astype(z.dtype), finished.astype(z.dtype)], axis=1)
        return jnp.concatenate([z.reshape(z.shape[0], -1), tail], axis=1)

    def moving(move: Callable) -> Callable:
        def run(weights: Any, at: Any, tolerance: Any) -> tuple[Any, ...]:
            like = jax.eval_shape(packed, weights, at, tolerance)
            at = move(weights, at, tolerance)
            return at, jnp.zeros(like.shape, like.dtype), *arrived(at, tolerance)

        return run

    def last(weights: Any, at: Any, tolerance: Any) -> tuple[Any, ...]:
        arrives, score = arrived(at, tolerance)
        return at, packed(weights, at, tolerance), arrives, score

    segments = [
        Segment(moving(first), weights, costs[0], "start", ("steps", "answer")),
        Segment(moving(step), weights, costs[1], "steps", ("steps", "answer"), max_trips=trips),
        Segment(last, weights, costs[2], "answer", (END,)),
    ]
    return Segmented(begin, weights, segments, [tolerance] * len(segments))


def from_continuous(
    model: Any,
    variables: Variables,
    inputs_shape: tuple[int, ...],
    *,
    attempts: int = 1,
    max_steps: int | None = None,
) -> SolveSegments:
    """Segments of a `ContinuousClassifier` around an `ODEBlock` with adaptive steps; the answers are logits.

    Args:
      model: the classifier.
      variables: with the control ``tolerance``, boxed or not.
      inputs_shape: [b h w c] (b is not looked at), for the costs.
      attempts: of a trip, see `ode_segments`.
      max_steps: default, the block's.
    """
    core = model.core(dtypes=model.dtypes, parent=None)
    how = getattr(core, "solver", None)
    if not isinstance(how, ODESolver) or how.steps or how.shared:
        raise DyncompError(
            "from_continuous needs a core of class ODEBlock with adaptive steps, one sequence an example"
        )
    params = nn.meta.unbox(variables)["params"]
    net = core.field(dtypes=model.dtypes, parent=None)
    stem = model.stem(dtypes=model.dtypes, parent=None)

    def field(params: Any, t: Any, z: Any) -> Any:
        return net.apply({"params": params["core"]["field"]}, t, z)

    prices = model.cost(inputs_shape)
    return ode_segments(
        field,
        params,
        (model.classes,),
        solver=how.solver,
        control=how.control,
        t1=core.end,
        tolerance=float(variables["controls"]["core"]["tolerance"]),
        max_steps=max_steps or how.max_steps,
        attempts=attempts,
        before=lambda p, images: core.widen(stem.apply({"params": p["stem"]}, images)),
        after=lambda p, z: model.apply({"params": p}, z, method="classify"),
        prices=(
            prices["stem"]["images"],
            prices["core"]["evaluations"],
            prices["core"]["attempts"],
            prices["head"]["images"],
        ),
    )
