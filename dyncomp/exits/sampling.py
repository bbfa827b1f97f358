"""Which exit's features a shared head sees while it learns (arXiv 2411.02359, sec. 3.3)."""

import jax
import jax.numpy as jnp

from dyncomp.core.typing import Array, Float, Int, Key


def every_step(key: Key[Array, ""], b: int, t: int, exits: int) -> Int[Array, "b t"]:
    """s1: an exit for every control step, uniformly."""
    return jax.random.randint(key, (b, t), 0, exits)


def two_runs(key: Key[Array, ""], b: int, t: int, exits: int) -> Int[Array, "b t"]:
    """s2: one exit up to a step, another one from there on, as long runs of equal exits occur when acting.

    The step is uniform in 1..t and the same for the whole batch (as in the released code); t itself leaves one exit for
    the whole window. The two exits of an example are independent, so sometimes equal.
    """
    cut, pair = jax.random.split(key)
    split = jax.random.randint(cut, (), 1, t + 1)
    first, second = jax.random.randint(pair, (2, b), 0, exits)
    return runs(split, first, second, t)


def runs(
    split: Int[Array, ""] | int, first: Int[Array, "b"], second: Int[Array, "b"], t: int
) -> Int[Array, "b t"]:
    """``first`` for the first ``split`` of t steps, ``second`` for the rest."""
    return jnp.where((jnp.arange(t) < split)[None], first[:, None], second[:, None])


def taken(features: Float[Array, "x b t d"], exits: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """The features of the exits that were drawn."""
    return jnp.take_along_axis(features, exits[None, ..., None], axis=0)[0]
