"""Deep equilibrium: a fixed point as a layer, with implicit gradients (Bai et al. 2019; Kidger 2022, implicit models).

The iterations are never differentiated. The point is found outside the gradient, the map is applied once more inside
it, and what flows back is replaced by v = (1 - J)^-T g, from v = J^T v + g by the same kind of iteration.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.recurrent.fixed_point import FIXED_SOLVERS, FixedSolver, FixedStats, fixed_point

Gradient = Literal["implicit", "one_step", "unroll"]
Backward = Literal["iterate", "anderson", "broyden", "gmres"]
Step = Callable[[Any, Any], Any]
"""``(given, z [b ...]) -> f(z)``: all that f reads is in ``given``, and gradients go there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """How a fixed point is found and differentiated.

    Attributes:
      solver, max_steps, memory: see `fixed_point`.
      gradient: "implicit" is exact for the point itself; "one_step" takes v = g (the phantom or Jacobian-free gradient
        of Geng et al. 2021 and Fung et al. 2022); "unroll" runs ``max_steps`` plain iterations and differentiates
        them all: a weight-tied network of that depth.
      backward: solver of the implicit gradient. "gmres" treats the batch as one system.
      backward_tolerance: of its residual; 0 takes the forward tolerance.
      backward_steps: its bound.
    """

    solver: FixedSolver = "iterate"
    max_steps: int = 64
    memory: int = 5
    gradient: Gradient = "implicit"
    backward: Backward = "iterate"
    backward_tolerance: float = 0.0
    backward_steps: int = 64

    def __post_init__(self):
        if self.gradient not in ("implicit", "one_step", "unroll"):
            raise DyncompError(
                f"gradient={self.gradient!r}: use 'implicit', 'one_step' or 'unroll'"
            )
        if self.backward not in ("iterate", "anderson", "broyden", "gmres"):
            raise DyncompError(
                f"backward={self.backward!r}: use 'iterate', 'anderson', 'broyden' or 'gmres'"
            )
        if self.solver not in FIXED_SOLVERS:
            raise DyncompError(f"solver={self.solver!r}: use one of {', '.join(FIXED_SOLVERS)}")
        if min(self.max_steps, self.memory, self.backward_steps) < 1 or self.backward_tolerance < 0:
            raise DyncompError(
                "FixedPoint: steps and memory are at least 1, tolerances not negative"
            )

    def __call__(
        self, step: Step, given: Any, start: Any, tolerance: Any
    ) -> tuple[Any, FixedStats]:
        """The point, or f of it where gradients flow, and what it took.

        Args:
          step: f; a function with a name of its own (it is hashed), not a new closure for every call.
          given: what f reads.
          start: [b ...], the first z.
          tolerance: scalar or [b].
        """
        if self.gradient == "unroll":
            return self._unrolled(step, given, start)
        fixed = lax.stop_gradient(given)
        found, stats = fixed_point(
            lambda z: step(fixed, z), lax.stop_gradient(start), lax.stop_gradient(tolerance),
            solver=self.solver, max_steps=self.max_steps, memory=self.memory,
        )  # fmt: skip
        once = step(given, lax.stop_gradient(found))
        if self.gradient == "implicit":
            once = _attach(step, self, tolerance, given, found, once)
        return once, stats

    def _unrolled(self, step: Step, given: Any, start: Any) -> tuple[Any, FixedStats]:
        body = lambda z, _: (step(given, z), None)
        z = lax.scan(body, start, None, length=self.max_steps)[0]
        runs = jnp.full(start.shape[:1], self.max_steps, jnp.int32)
        nothing = jnp.zeros(start.shape[:1], start.dtype)
        return z, FixedStats(runs, runs, nothing, runs > 0)


def adjoint(
    step: Step, given: Any, point: Any, g: Any, tolerance: Any, how: FixedPoint = FixedPoint()
) -> tuple[Any, FixedStats | None]:
    """v = (1 - J)^-T g with J = df/dz at ``point``, and what it took (None with GMRES)."""
    pull = jax.vjp(lambda z: step(given, z), point)[1]
    backwards = lambda v: pull(v)[0]
    if how.backward_tolerance:
        tolerance = how.backward_tolerance
    if how.backward == "gmres":
        system = lambda v: v - backwards(v)
        solve = functools.partial(jax.scipy.sparse.linalg.gmres, system, g, x0=g)
        tightest = jnp.min(jnp.asarray(tolerance, g.dtype))
        return solve(tol=tightest, maxiter=how.backward_steps)[0], None
    return fixed_point(
        lambda v: backwards(v) + g, g, tolerance,
        solver=how.backward, max_steps=how.backward_steps, memory=how.memory,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attach(step: Step, how: FixedPoint, tolerance: Any, given: Any, found: Any, once: Any) -> Any:
    """``once``; its cotangent g becomes (1 - J)^-T g."""
    return once


def _attach_fwd(step: Step, how: FixedPoint, tolerance: Any, given: Any, found: Any, once: Any):
    return once, (tolerance, given, found)


def _attach_bwd(step: Step, how: FixedPoint, saved: Any, g: Any) -> tuple[Any, ...]:
    tolerance, given, found = saved
    v, _ = adjoint(step, given, found, g, tolerance, how)
    return None, None, None, v


_attach.defvjp(_attach_fwd, _attach_bwd)
