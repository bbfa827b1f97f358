"""Penalties that make dynamics cheap to integrate: integrals along the solution, solved beside it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float

Penalty = Literal["kinetic", "jacobian", "acceleration"]
PENALTIES: tuple[Penalty, ...] = ("kinetic", "jacobian", "acceleration")
Plain = Callable[[Any, Any, Any], Any]
"""``(weights, t [b], z [b ...]) -> slope``."""


def check_penalties(names: Sequence[str]) -> None:
    """Refuses an unknown penalty."""
    if unknown := [name for name in names if name not in PENALTIES]:
        raise DyncompError(f"penalty {unknown[0]!r}: use some of {', '.join(PENALTIES)}")


def penalised(field: Plain, names: Sequence[str]) -> Callable[..., Any]:
    """f with the integrands of penalties beside it, all [b] and means over the n values of a state.

    - kinetic: |f|^2 / n (RNODE, arXiv 2002.02798);
    - jacobian: |e^T J|^2 / n with a noise e that stays the same over a solve; for noise of mean 0 and variance 1 its
      expectation is the squared Frobenius norm over n (RNODE);
    - acceleration: |d^2 z/dt^2|^2 / n, the total derivative of f along the solution (TayNODE, arXiv 2007.04504, K = 2).

    Returns:
      ``(weights, noise [b ...], t, (z, extras)) -> (slope, integrands)``, a field for `ODESolver`.
    """
    check_penalties(names)

    def both(weights: Any, noise: Any, t: Any, state: Any) -> Any:
        z = state[0]
        plain = lambda t, z: field(weights, t, z)
        slope = plain(t, z)
        found = {}
        if "kinetic" in names:
            found["kinetic"] = _mean_square(slope)
        if "jacobian" in names:
            (row,) = jax.vjp(lambda z: plain(t, z), z)[1](noise)
            found["jacobian"] = _mean_square(row)
        if "acceleration" in names:
            found["acceleration"] = _mean_square(total_derivative(plain, t, z))
        return slope, found

    return both


def total_derivative(f: Callable[[Any, Any], Any], t: Float[Array, "b"], z: Any) -> Any:
    """d^2 z/dt^2 = df/dt + df/dz f along solutions of dz/dt = f(t, z)."""
    return jax.jvp(f, (t, z), (jnp.ones_like(t), f(t, z)))[1]


def penalty_cost(names: Sequence[str], field: Cost, values: int) -> Cost:
    """What the penalties add to an evaluation of one state of so many values."""
    derivatives = sum(name in ("jacobian", "acceleration") for name in names)
    return field * derivatives + Cost(2 * values * len(names))


def _mean_square(x: Array) -> Array:
    flat = x.reshape(x.shape[0], -1)
    return jnp.mean(flat * flat, axis=1)
