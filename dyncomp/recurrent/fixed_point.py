"""Fixed points z = f(z) of a batch, every example to its own residual: iteration, Anderson, Broyden, Newton."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float

FixedSolver = Literal["iterate", "anderson", "broyden", "newton"]
FIXED_SOLVERS: tuple[FixedSolver, ...] = ("iterate", "anderson", "broyden", "newton")
Map = Callable[[Any], Any]
"""z [b ...] -> f(z) [b ...]; examples must not read each other."""


@struct.dataclass
class FixedStats:
    """What a solve took; every leaf [b].

    Attributes:
      needed: int32, evaluations of f until the example's residual was small enough; a Newton step counts one for f
        and one for every column of the Jacobian.
      executed: int32, those the device made for it, until the slowest example had ended.
      residual: |f(z) - z| / (1 + |f(z)|) at the z given back, 2-norms.
      finished: bool, whether it is within the tolerance.
    """

    needed: Any
    executed: Any
    residual: Any
    finished: Any


@struct.dataclass
class _At:
    z: Array
    image: Array
    runs: Array
    trips: Array
    memory: Any


def fixed_point(
    f: Map,
    z: Float[Array | np.ndarray, "b *n"],
    tolerance: Any,
    *,
    solver: FixedSolver = "iterate",
    max_steps: int = 64,
    memory: int = 5,
) -> tuple[Float[Array, "b *n"], FixedStats]:
    """The point and what it took. No gradient goes through the loop (see `equilibrium`).

    Args:
      f: the map.
      z: where to start.
      tolerance: scalar or [b], of the residual (`FixedStats`).
      solver: "iterate" z <- f(z); "anderson" mixes the last ``memory`` images (type II, weights by least squares);
        "broyden" keeps a rank-one change of the inverse Jacobian of f(z) - z for every step (the "good" update);
        "newton" solves with the dense Jacobian of each example.
      max_steps: evaluations (Newton: steps) at most; an example that needs more stays where it got to.
      memory: of "anderson".
    """
    if solver not in FIXED_SOLVERS:
        raise DyncompError(f"solver={solver!r}: use one of {', '.join(FIXED_SOLVERS)}")
    if max_steps < 1 or memory < 1:
        raise DyncompError(f"max_steps={max_steps}, memory={memory}: use 1 or more")
    shape = z.shape
    flat = lambda z: f(z.reshape(shape)).reshape(shape[0], -1)
    start = jnp.asarray(z).reshape(shape[0], -1)
    begin, propose = _methods(solver, flat, max_steps, memory)
    zero = jnp.zeros(shape[:1], jnp.int32)
    at = _At(start, flat(start), zero + 1, jnp.int32(1), begin(start))
    price = 1 + (start.shape[1] if solver == "newton" else 0)

    def going(at: _At) -> Array:
        return residual(at.z, at.image) > tolerance

    def body(at: _At) -> _At:
        here = going(at)
        z, memory = propose(at)
        z = jnp.where(here[:, None], z, at.z)
        image = jnp.where(here[:, None], flat(z), at.image)
        return _At(z, image, at.runs + price * here, at.trips + 1, memory)

    at = lax.while_loop(lambda at: jnp.any(going(at)) & (at.trips < max_steps), body, at)
    found = residual(at.z, at.image)
    ran = 1 + price * (at.trips - 1)
    stats = FixedStats(at.runs, jnp.broadcast_to(ran, zero.shape), found, found <= tolerance)
    return at.z.reshape(shape), stats


def residual(z: Float[Array, "b *n"], image: Float[Array, "b *n"]) -> Float[Array, "b"]:
    """|f(z) - z| / (1 + |f(z)|)."""
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), axis=1))
    return norm(image - z) / (1.0 + norm(image))


def _methods(solver: str, f: Map, max_steps: int, memory: int) -> tuple[Callable, Callable]:
    """(z -> memory at the start, where -> (next z, memory))."""
    if solver == "iterate":
        return lambda z: (), lambda at: (at.image, ())
    if solver == "newton":
        return lambda z: (), lambda at: (_newton(f, at), ())
    if solver == "anderson":
        return lambda z: (_slots(z, memory), _slots(z, memory)), _anderson
    start = lambda z: (_slots(z, max_steps), _slots(z, max_steps), jnp.zeros_like(z), z)
    return start, _broyden


def _slots(z: Array, count: int) -> Array:
    return jnp.zeros((z.shape[0], count, z.shape[1]), z.dtype)


def _newton(f: Map, at: _At) -> Array:
    b, n = at.z.shape
    push = lambda e: jax.jvp(f, (at.z,), (jnp.broadcast_to(e, (b, n)),))[1]
    columns = jax.vmap(push, out_axes=2)(jnp.eye(n, dtype=at.z.dtype))
    system = jnp.eye(n, dtype=at.z.dtype)[None] - columns
    return at.z + jnp.linalg.solve(system, (at.image - at.z)[..., None])[..., 0]


def _anderson(at: _At) -> tuple[Array, Any]:
    """The mix of kept images whose residuals cancel best (Walker and Ni 2011), weights summing to 1."""
    images, gaps = at.memory
    slots = gaps.shape[1]
    place = (at.trips - 1) % slots
    images, gaps = images.at[:, place].set(at.image), gaps.at[:, place].set(at.image - at.z)
    used = jnp.arange(slots) < at.trips
    gram = jnp.einsum("bin,bjn->bij", gaps, gaps)
    largest = jnp.max(jnp.diagonal(gram, axis1=1, axis2=2), axis=1)[:, None, None]
    tiny = 10 * jnp.finfo(gram.dtype).eps
    gram = gram / jnp.where(largest > 0, largest, 1.0)
    eye = jnp.eye(slots, dtype=gram.dtype)
    # Empty slots get a row of the identity and no right side, so no weight.
    gram = jnp.where(used[None, :, None] & used[None, None, :], gram, 0.0)
    gram = gram + jnp.where(used, tiny, 1.0)[None, :, None] * eye[None]
    ones = jnp.broadcast_to(used.astype(gram.dtype), gram.shape[:2])
    weights = jnp.linalg.solve(gram, ones[..., None])[..., 0]
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)
    return jnp.einsum("bi,bin->bn", weights, images), (images, gaps)


def _broyden(at: _At) -> tuple[Array, Any]:
    """Good Broyden on g(z) = f(z) - z; the inverse Jacobian starts at -1, so the first step is z <- f(z)."""
    left, right, before, z_before = at.memory
    gap = at.image - at.z
    times = lambda x: -x + jnp.einsum("bmn,bm->bn", left, jnp.einsum("bmn,bn->bm", right, x))
    row = lambda x: -x + jnp.einsum("bmn,bm->bn", right, jnp.einsum("bmn,bn->bm", left, x))
    move, change = at.z - z_before, gap - before
    after, reach = row(move), times(change)
    scale = jnp.sum(after * change, axis=1, keepdims=True)
    safe = jnp.where(scale == 0, 1.0, scale)
    new = jnp.where(scale == 0, 0.0, (move - reach) / safe)  # no move yet, or none left: no change
    place = jnp.maximum(at.trips - 2, 0)
    left, right = left.at[:, place].set(new), right.at[:, place].set(after)
    return at.z - times(gap), (left, right, gap, at.z)
