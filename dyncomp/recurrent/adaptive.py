"""Adaptive steps of an embedded Runge-Kutta pair, every example of a batch on a clock of its own.

One attempted step is one function: what a loop outside decides to run again, and on whom. Steps, errors and the
controller follow diffrax 0.7 (Tsit5, Dopri5, PIDController), so that counts of steps agree with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float
from dyncomp.recurrent.tableau import Tableau

BatchField = Callable[[Any, Any], Any]
"""dz/dt of a batch: (t [b], z [b ...]) -> [b ...]; examples must not read each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepControl:
    """How the next step follows from error estimates: a PID controller (the defaults make it an I controller).

    A step is accepted where its scaled error E < 1. The next step is h * safety * E_n^-b1 * E_{n-1}^-b2 * E_{n-2}^-b3
    with b1 = (p + i + d)/k, b2 = -(p + 2 d)/k, b3 = d/k and k the pair's order; the factor is cut to [1, grow] after
    an accepted step and to [shrink, safety] after a rejected one. Earlier errors are those of accepted steps. No
    gradient goes through any of it.

    Attributes:
      pcoeff, icoeff, dcoeff: p, i and d.
      first_step: length of the first attempt (diffrax 0.7.2 takes 0.01 whatever the problem); 0 estimates it from two
        evaluations (Hairer, Norsett and Wanner 1993, II.4).
      atol_ratio: atol = atol_ratio * tolerance, where rtol = tolerance.
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    shrink: float = 0.2
    grow: float = 10.0
    first_step: float = 0.01
    atol_ratio: float = 1.0

    def __post_init__(self):
        if not 0 < self.shrink < self.safety < 1 <= self.grow:
            raise DyncompError(
                f"StepControl: shrink={self.shrink}, safety={self.safety}, grow={self.grow}: "
                "use 0 < shrink < safety < 1 <= grow"
            )
        if self.first_step < 0 or self.atol_ratio <= 0:
            raise DyncompError("StepControl: use first_step >= 0 and atol_ratio > 0")

    def factor(self, inverse: Any, before: Any, earlier: Any, keep: Any, order: int) -> Any:
        """The next step over this one; ``inverse``, ``before``, ``earlier``: 1/E_n, 1/E_{n-1}, 1/E_{n-2}."""
        p, i, d = self.pcoeff, self.icoeff, self.dcoeff
        powers = (
            (inverse, (p + i + d) / order),
            (before, -(p + 2 * d) / order),
            (earlier, d / order),
        )
        wanted = self.safety
        for value, exponent in powers:
            wanted = wanted * value**exponent if exponent else wanted
        low, high = jnp.where(keep, 1.0, self.shrink), jnp.where(keep, self.grow, self.safety)
        return lax.stop_gradient(jnp.clip(wanted, low, high))


@struct.dataclass
class Progress:
    """Where every example's solve stands.

    Attributes:
      t, until: [b], from where and to where the next attempt goes.
      z: [b ...].
      slope: [b ...], f(t, z).
      errors: [b 2], 1/E of the last two accepted steps.
      accepted, rejected: int32 [b].
    """

    t: Any
    until: Any
    z: Any
    slope: Any
    errors: Any
    accepted: Any
    rejected: Any


def blank(z: Float[Array, "b *n"]) -> Progress:
    """A solve that has not begun."""
    zero = jnp.zeros(z.shape[:1], z.dtype)
    none = jnp.zeros(z.shape[:1], jnp.int32)
    return Progress(
        zero, zero, z, jnp.zeros_like(z), jnp.ones((z.shape[0], 2), z.dtype), none, none
    )


def begin(
    field: BatchField, z: Float[Array | np.ndarray, "b *n"], t0: float, t1: float, control: StepControl,
    tolerance: Any, order: int,
) -> Progress:  # fmt: skip
    """The start of a solve from t0 to t1: one evaluation of f, two where the first step is estimated.

    Args:
      field: f.
      z: the state at t0.
      tolerance: scalar or [b].
      order: of the pair.
    """
    b, dtype = z.shape[0], z.dtype
    if t1 < t0:
        raise DyncompError(f"a solve from {t0} to {t1}: turn time round in f to go backwards")
    t = jnp.full((b,), t0, dtype)
    slope = field(t, z)
    step = jnp.full((b,), control.first_step, dtype)
    if not control.first_step:
        step = first_step(field, t, z, slope, control, tolerance, order)
    zeros = jnp.zeros((b,), jnp.int32)
    until = jnp.minimum(t + step.astype(dtype), jnp.asarray(t1, dtype))
    return Progress(t, until, z, slope, jnp.ones((b, 2), dtype), zeros, zeros)


def attempt(
    field: BatchField, at: Progress, t1: float, tableau: Tableau, control: StepControl, tolerance: Any
) -> Progress:  # fmt: skip
    """One attempted step of every example that has not reached t1; the others stay as they are.

    ``tableau.fresh`` evaluations of f. The pair must be first-same-as-last.
    """
    if not tableau.fsal or not tableau.error:
        raise DyncompError(
            "adaptive steps need an embedded pair, first same as last: tsit5 or dopri5"
        )
    running = ~done(at, t1)
    z, slopes = stages(field, tableau, at.t, at.until - at.t, at.z, at.slope)
    error = _combine(tableau.error, slopes, at.until - at.t)
    bad = jnp.any(jnp.isnan(z).reshape(z.shape[0], -1), axis=1)
    reached = jnp.where(_like(bad, z), at.z, z)
    size = jnp.maximum(jnp.abs(at.z), jnp.abs(reached))
    scaled = lax.stop_gradient(_rms(error / _scale(size, control, tolerance)))
    keep = scaled < 1.0  # false where it is not a number
    inverse = 1.0 / scaled
    factor = control.factor(inverse, at.errors[:, 0], at.errors[:, 1], keep, tableau.order)
    factor = jnp.where(jnp.isnan(factor), control.shrink, factor)
    step = (at.until - at.t) * factor
    t = jnp.where(keep, at.until, at.t)
    inverse = jnp.where((inverse == 0) | jnp.isinf(inverse), 1.0, inverse)
    moved = Progress(
        t=t,
        until=_up_to(t, t + step, t1, keep),
        z=jnp.where(_like(keep, z), z, at.z),
        slope=jnp.where(_like(keep, z), slopes[-1], at.slope),
        errors=jnp.where(keep[:, None], jnp.stack([inverse, at.errors[:, 0]], 1), at.errors),
        accepted=at.accepted + keep,
        rejected=at.rejected + ~keep,
    )
    return jax.tree.map(lambda new, old: jnp.where(_like(running, old), new, old), moved, at)


def done(at: Progress, t1: float) -> Any:
    """bool [b], which examples have reached t1."""
    return at.t >= jnp.asarray(t1, at.t.dtype)


def evaluations(at: Progress, tableau: Tableau, control: StepControl) -> Any:
    """int [b], evaluations of f that every example needed so far, rejected steps and the start included."""
    start = 1 if control.first_step else 2
    return start + tableau.fresh * (at.accepted + at.rejected)


def equal_steps(
    field: BatchField, z: Float[Array | np.ndarray, "b *n"], t1: float, steps: Any, tableau: Tableau
) -> Float[Array, "b *n"]:
    """z(t1) from t = 0 by equal steps; how many is a run-time argument, scalar or [b].

    Every step evaluates all stages afresh.
    """
    b = z.shape[0]
    steps = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), (b,))
    h = jnp.asarray(t1, z.dtype) / steps.astype(z.dtype)

    def body(n: Any, z: Any) -> Any:
        t = n.astype(z.dtype) * h
        new, _ = stages(field, tableau, t, h, z, field(t, z))
        return jnp.where(_like(n < steps, z), new, z)

    return lax.fori_loop(0, jnp.max(steps), body, z)


def stages(
    field: BatchField, tableau: Tableau, t: Any, h: Any, z: Any, first: Any
) -> tuple[Any, list[Any]]:
    """The state after a step of h [b], and all stages' slopes; ``first`` is f(t, z)."""
    slopes, point = [first], z
    for row, c in zip(tableau.a, tableau.c, strict=True):
        point = z + _combine(row, slopes, h)
        slopes.append(field(t + jnp.asarray(c, t.dtype) * h, point))
    return (point if tableau.fsal else z + _combine(tableau.b, slopes, h)), slopes


def first_step(
    field: BatchField, t: Any, z: Any, slope: Any, control: StepControl, tolerance: Any, order: int
) -> Float[Array, "b"]:
    """Length [b] of a first step, from a small Euler step (Hairer, Norsett and Wanner 1993, II.4)."""
    scale = _scale(jnp.abs(z), control, tolerance)
    size, speed = _rms(z / scale), _rms(slope / scale)
    flat = (size < 1e-5) | (speed < 1e-5)
    small = jnp.where(flat, 1e-6, 0.01 * size / jnp.where(flat, 1.0, speed))
    after = field(t + small, z + _like(small, z) * slope)
    most = jnp.maximum(jnp.where(flat, 1.0, speed), _rms((after - slope) / scale) / small)
    still = most <= 1e-15
    large = (0.01 / jnp.where(still, 1.0, most)) ** (1 / order)
    large = jnp.where(still, jnp.maximum(1e-6, small * 1e-3), large)
    return lax.stop_gradient(jnp.minimum(100 * small, large))


def _scale(size: Any, control: StepControl, tolerance: Any) -> Any:
    rtol = jnp.asarray(tolerance, size.dtype)
    rtol = _like(jnp.broadcast_to(rtol, size.shape[:1]), size)
    return control.atol_ratio * rtol + size * rtol


def _up_to(t: Any, until: Any, t1: float, keep: Any) -> Any:
    """The next end, cut at t1; after a rejected step that would still reach it, half of what is left."""
    end = np.asarray(t1, t.dtype)
    floor = end
    for _ in range(100):  # as close as this to the end is the end
        floor = np.nextafter(floor, np.asarray(-np.inf, t.dtype))
    return jnp.where(until > floor, jnp.where(keep, end, t + 0.5 * (end - t)), until)


def _combine(weights: Any, slopes: list[Any], h: Any) -> Any:
    total = sum(w * k for w, k in zip(weights, slopes, strict=True) if w)
    return _like(h, slopes[0]) * total


def _like(row: Any, z: Any) -> Any:
    return row.reshape(-1, *[1] * (z.ndim - 1))


def _rms(z: Any) -> Any:
    flat = z.reshape(z.shape[0], -1)
    return jnp.sqrt(jnp.mean(flat * flat, axis=1))
