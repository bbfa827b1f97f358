"""Reversible Heun: a solver whose steps can be taken back, so gradients are exact and memory does not grow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.core.errors import DyncompError


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def reversible_heun(
    field: Callable[[Any, Any, Any], Any], weights: Any, z: Any, t0: float, t1: float, steps: int
) -> Any:
    """z(t1) by equal steps of reversible Heun (Kidger et al. 2021, arXiv 2105.13493, algorithm 1), order 2.

    A step evaluates f once; the solve once more at its start. The backward pass rebuilds every step from the next one,
    up to rounding, so it keeps one state whatever the number of steps; it evaluates f and its vector-Jacobian product
    once a step.

    Args:
      field: ``(weights, t, z) -> dz/dt``; t is a scalar, z and what comes back are pytrees alike.
      weights: what gradients go to, beside z.
      z: the state at t0.
      t0, t1, steps: static.
    """
    return _forward(field, weights, z, t0, t1, steps)[0]


def _forward(field: Any, weights: Any, z: Any, t0: float, t1: float, steps: int) -> Any:
    if steps < 1:
        raise DyncompError(f"reversible_heun: steps={steps}; use 1 or more")
    h = (t1 - t0) / steps

    def step(n: Any, at: Any) -> Any:
        return _step(field, weights, at, t0 + (n + 1) * h, h)

    return jax.lax.fori_loop(0, steps, step, (z, z, field(weights, _time(z, t0), z)))


def _step(field: Any, weights: Any, at: Any, t: Any, h: float) -> Any:
    """(z, its shadow, slope of the shadow) after a step that ends at t; with -h, before it."""
    z, shadow, slope = at
    after = jax.tree.map(lambda z, s, k: 2 * z - s + h * k, z, shadow, slope)
    new = field(weights, _time(z, t), after)
    z = jax.tree.map(lambda z, k, m: z + h / 2 * (k + m), z, slope, new)
    return z, after, new


def _time(z: Any, t: Any) -> Any:
    return jnp.asarray(t, jax.tree.leaves(z)[0].dtype)


def _fwd(field: Any, weights: Any, z: Any, t0: float, t1: float, steps: int) -> Any:
    end = _forward(field, weights, z, t0, t1, steps)
    return end[0], (weights, z, end)


def _bwd(field: Any, t0: float, t1: float, steps: int, saved: Any, g: Any) -> Any:
    weights, start, end = saved
    h = (t1 - t0) / steps
    zeros = jax.tree.map(jnp.zeros_like, g)

    def back(n: Any, state: Any) -> Any:
        at, (grads, total) = state
        index = steps - 1 - n
        before = _step(field, weights, at, t0 + index * h, -h)
        local = lambda weights, at: _step(field, weights, at, t0 + (index + 1) * h, h)
        own, earlier = jax.vjp(local, weights, before)[1](grads)
        return before, (earlier, jax.tree.map(jnp.add, total, own))

    first = (end, ((g, zeros, zeros), jax.tree.map(jnp.zeros_like, weights)))
    _, ((direct, shadow, slope), total) = jax.lax.fori_loop(0, steps, back, first)
    pull = jax.vjp(lambda weights, z: field(weights, _time(z, t0), z), weights, start)[1]
    own, through = pull(slope)
    together = jax.tree.map(lambda a, b, c: a + b + c, direct, shadow, through)
    return jax.tree.map(jnp.add, total, own), together


reversible_heun.defvjp(_fwd, _bwd)
