"""The libraries of the extra ``ode``, imported where they are used and not before."""

import functools
import importlib
from typing import Any

from dyncomp.core.errors import DyncompError


@functools.cache
def diffrax() -> Any:
    """The module diffrax.

    Raises:
      DyncompError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("diffrax")
    except ImportError:
        raise DyncompError(
            "differential equations need diffrax: pip install 'dyncomp[ode]'"
        ) from None


@functools.cache
def counting() -> Any:
    """A step size controller around another: it counts rejections before the first accepted step.

    After each of those diffrax evaluates stage 1 again, and its own statistics do not tell how many there were.
    """
    import jax.numpy as jnp

    dx = diffrax()

    class Counting(dx.AbstractStepSizeController):
        inner: Any

        def wrap(self, direction: Any) -> Any:
            return Counting(self.inner.wrap(direction))

        def init(self, *args: Any) -> Any:
            t, state = self.inner.init(*args)
            return t, (state, jnp.int32(0), jnp.asarray(False))

        def adapt_step_size(self, *args: Any) -> Any:
            *given, (state, again, begun) = args
            keep, *rest, state, result = self.inner.adapt_step_size(*given, state)
            again = again + jnp.where(begun | keep, 0, 1).astype(jnp.int32)
            return keep, *rest, (state, again, begun | keep), result

    return Counting


@functools.cache
def fourth_order() -> Any:
    """The classical Runge-Kutta method, which diffrax does not have."""
    import numpy as np

    from dyncomp.recurrent.tableau import RK4

    dx = diffrax()

    class Classical(dx.AbstractERK):
        tableau = dx.ButcherTableau(
            c=np.array(RK4.c),
            b_sol=np.array(RK4.b),
            b_error=np.zeros(4),
            a_lower=tuple(np.array(row) for row in RK4.a),
        )
        interpolation_cls = dx.LocalLinearInterpolation

        def order(self, terms: Any) -> int:
            return RK4.order

    return Classical
