"""Differential equations through diffrax: solvers, adjoints, and what was evaluated.

The state of a solve is a pair ``(z, extras)``: steps follow the error of z alone, extras (integrals such as a penalty)
ride along. Weights and what else f reads are arguments, never closed over, so that every adjoint differentiates them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.recurrent import extra
from dyncomp.recurrent.adaptive import StepControl, first_step
from dyncomp.recurrent.reversible import reversible_heun
from dyncomp.recurrent.tableau import TABLEAUS

Solver = Literal["tsit5", "dopri5", "rk4", "euler", "reversible_heun"]
Adjoint = Literal["checkpoint", "direct", "backsolve", "seminorm", "reversible"]
State = tuple[Any, Any]
Field = Callable[[Any, Any, Any, State], State]
"""``(weights, given, t [b], (z [b ...], extras)) -> slopes``; ``given`` has a batch axis, like the state."""

PAIRS = ("tsit5", "dopri5")


@struct.dataclass
class SolveStats:
    """What a solve took; every leaf [b].

    Attributes:
      accepted, rejected: int32, attempted steps.
      again: int32, evaluations that diffrax repeats: one after each rejection before the first accepted step.
      needed: int32, evaluations of f that the example's own steps take, rejected ones and the start included.
      executed: int32, evaluations that the batch made the device do for it, until the slowest example had ended.
      attempts: int32, attempted steps that were executed.
      finished: bool, whether t1 was reached within the bound on steps.
    """

    accepted: Any
    rejected: Any
    again: Any
    needed: Any
    executed: Any
    attempts: Any
    finished: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ODESolver:
    """How differential equations of a batch are solved.

    Attributes:
      solver: "tsit5" and "dopri5" may adapt their steps; "rk4", "euler" and "reversible_heun" need ``steps``.
      steps: equal steps; 0 adapts them to the tolerance.
      control: of adaptive steps.
      max_steps: of an adaptive solve; an example that needs more stays where it got to, and ``finished`` says so.
      adjoint: "checkpoint" differentiates the steps taken, keeping a few states (diffrax's RecursiveCheckpointAdjoint,
        memory of order sqrt or log of the steps); "direct" keeps all; "backsolve" solves the adjoint equation
        backwards in time: constant memory, approximate; "seminorm" the same without the parameters' part in its error
        norm; "reversible" belongs to "reversible_heun". No gradient goes through the choice of steps.
      shared: the batch is one state with one sequence of steps; else every example has its own under `jax.vmap`,
        where the loop runs until the slowest has ended.
    """

    solver: Solver = "tsit5"
    steps: int = 0
    control: StepControl = StepControl()
    max_steps: int = 256
    adjoint: Adjoint = "checkpoint"
    shared: bool = False

    def __post_init__(self):
        if self.solver not in (*TABLEAUS, "reversible_heun"):
            raise DyncompError(f"solver={self.solver!r}: use one of {', '.join(TABLEAUS)}")
        if self.adjoint not in ("checkpoint", "direct", "backsolve", "seminorm", "reversible"):
            raise DyncompError(
                f"adjoint={self.adjoint!r}: use 'checkpoint', 'direct' or 'backsolve'"
            )
        if (self.solver == "reversible_heun") != (self.adjoint == "reversible"):
            raise DyncompError("adjoint='reversible' and solver='reversible_heun' belong together")
        if not self.steps and self.solver not in PAIRS:
            raise DyncompError(f"solver={self.solver!r} has no error estimate: set steps >= 1")
        if self.steps < 0 or self.max_steps < 1:
            raise DyncompError(
                f"steps={self.steps}, max_steps={self.max_steps}: not negative, >= 1"
            )

    def __call__(
        self,
        field: Field,
        weights: Any,
        given: Any,
        state: State,
        tolerance: Any = 1e-3,
        t0: float = 0.0,
        t1: float = 1.0,
    ) -> tuple[State, SolveStats]:
        """The state at t1.

        Args:
          field: f.
          weights: gradients go to them, and to ``given`` and ``state``.
          given: [b ...], what else f reads of an example.
          state: (z [b ...], extras [b ...]) at t0.
          tolerance: scalar or [b]; rtol, and atol over ``control.atol_ratio``. Not looked at with equal steps.
          t0, t1: static; t0 <= t1.
        """
        if t1 < t0:
            raise DyncompError(f"a solve from {t0} to {t1}: turn time round in f to go backwards")
        b = state[0].shape[0]
        tolerance = jnp.broadcast_to(jnp.asarray(tolerance, state[0].dtype), (b,))
        if t1 == t0:
            none = jnp.zeros((b,), jnp.int32)
            return state, SolveStats(none, none, none, none, none, none, none == 0)
        if self.solver == "reversible_heun":

            def heun(both: Any, t: Any, state: State) -> State:
                weights, given = both
                return field(weights, given, jnp.broadcast_to(t, (b,)), state)

            state = reversible_heun(heun, (weights, given), state, t0, t1, self.steps)
            return state, self._stats(jnp.full((b,), self.steps, jnp.int32), 0 * tolerance, 0)
        step = self._first_step(field, weights, given, state, tolerance, t0, t1)
        if self.shared:
            return self._together(field, weights, given, state, tolerance, step, t0, t1)
        one = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
        alone = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)

        def single(t: Any, state: State, args: Any) -> State:
            weights, given = args
            return alone(field(weights, one(given), jnp.reshape(t, (1,)), one(state)))

        def solve(given: Any, state: State, tolerance: Any, step: Any) -> Any:
            return self._solve(single, (weights, given), state, tolerance, step, t0, t1)

        state, accepted, rejected, again, finished = jax.vmap(solve)(given, state, tolerance, step)
        return state, self._stats(accepted, rejected, again, finished)

    def _together(self, field, weights, given, state, tolerance, step, t0, t1) -> Any:
        b = state[0].shape[0]

        def whole(t: Any, state: State, args: Any) -> State:
            return field(*args, jnp.broadcast_to(t, (b,)), state)

        found = self._solve(whole, (weights, given), state, tolerance.min(), step.min(), t0, t1)
        counts = (jnp.broadcast_to(leaf, (b,)) for leaf in found[1:])
        return found[0], self._stats(*counts)

    def _solve(self, f, args, state, tolerance, step, t0, t1) -> Any:
        dx = extra.diffrax()
        names = {"euler": dx.Euler, "tsit5": dx.Tsit5, "dopri5": dx.Dopri5}
        method = names[self.solver]() if self.solver in names else extra.fourth_order()()
        fixed = bool(self.steps)
        adapt = (
            dx.ConstantStepSize() if fixed else extra.counting()(self._pid(tolerance, _of_state))
        )
        found = dx.diffeqsolve(
            dx.ODETerm(f),
            method,
            t0,
            t1,
            (t1 - t0) / self.steps if fixed else step,
            state,
            args,
            stepsize_controller=adapt,
            adjoint=self._adjoint(tolerance),
            max_steps=self.steps + 1 if fixed else self.max_steps,
            throw=False,
            saveat=dx.SaveAt(t1=True, controller_state=not fixed),
        )
        int32 = lambda value: jnp.asarray(value, jnp.int32)
        again = int32(0) if fixed else found.controller_state[1]
        stats = found.stats["num_accepted_steps"], found.stats["num_rejected_steps"]
        ended = found.result == dx.RESULTS.successful
        last = jax.tree.map(lambda leaf: leaf[0], found.ys)
        return last, *map(int32, stats), again, jnp.asarray(ended)

    def _pid(self, tolerance: Any, norm: Callable[[Any], Any]) -> Any:
        own = self.control
        return extra.diffrax().PIDController(
            rtol=tolerance, atol=own.atol_ratio * tolerance, norm=norm, pcoeff=own.pcoeff,
            icoeff=own.icoeff, dcoeff=own.dcoeff, safety=own.safety, factormin=own.shrink,
            factormax=own.grow,
        )  # fmt: skip

    def _adjoint(self, tolerance: Any) -> Any:
        dx = extra.diffrax()
        if self.adjoint == "checkpoint":
            return dx.RecursiveCheckpointAdjoint()
        if self.adjoint == "direct":
            return dx.DirectAdjoint()
        if self.steps:
            return dx.BacksolveAdjoint()
        norm = _all if self.adjoint == "backsolve" else dx.adjoint_rms_seminorm
        return dx.BacksolveAdjoint(stepsize_controller=self._pid(tolerance, norm))

    def _first_step(self, field, weights, given, state, tolerance, t0, t1) -> Any:
        """[b], of an adaptive solve."""
        b, z = state[0].shape[0], state[0]
        if self.control.first_step or self.steps:
            return jnp.full((b,), self.control.first_step or t1 - t0, z.dtype)
        f = lambda t, z: field(weights, given, t, (z, state[1]))[0]
        t = jnp.full((b,), t0, z.dtype)
        order = TABLEAUS[self.solver].order
        return first_step(f, t, z, f(t, z), self.control, tolerance, order)

    def _stats(self, accepted: Any, rejected: Any, again: Any, finished: Any = True) -> SolveStats:
        like = lambda value: jnp.broadcast_to(jnp.asarray(value), accepted.shape)
        rejected, again = (like(value).astype(jnp.int32) for value in (rejected, again))
        attempts = accepted + rejected
        most, repeats = attempts.max(initial=0), again.max(initial=0)
        pair = self.solver in PAIRS
        fresh = TABLEAUS[self.solver].fresh if self.solver in TABLEAUS else 1
        start = 0 if self.steps or self.control.first_step else 2
        extra_one = lambda attempts, again: start + (1 + again if pair else 0) * (attempts > 0)
        if self.solver == "reversible_heun":
            extra_one = lambda attempts, again: 1
        return SolveStats(
            accepted=accepted,
            rejected=rejected,
            again=again,
            needed=(fresh * attempts + extra_one(attempts, again)).astype(jnp.int32),
            executed=like(fresh * most + extra_one(most, repeats)).astype(jnp.int32),
            attempts=like(most).astype(jnp.int32),
            finished=like(finished),
        )


def _rms(z: Any) -> Any:
    leaves = [leaf.reshape(-1) for leaf in jax.tree.leaves(z)]
    flat = jnp.concatenate(leaves) if leaves else jnp.zeros((1,))
    return jnp.sqrt(jnp.mean(flat * flat))


def _of_state(error: State) -> Any:
    """The norm of an error: z's alone."""
    return _rms(error[0])


def _all(error: Any) -> Any:
    """The norm of an adjoint solve's error: state, adjoint and the parameters' gradient."""
    return _rms([leaf for leaf in jax.tree.leaves(error) if leaf is not None])
