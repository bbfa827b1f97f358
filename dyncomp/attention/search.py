"""The offline search for the pattern of every head: candidates of equal cost, least error (MInference, algorithm 1)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dyncomp.attention.chosen import Chosen, attend_chosen
from dyncomp.attention.patterns import VerticalSlash
from dyncomp.attention.sight import Sight
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array
from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import causal_lists

Heads = tuple[Array, Array, Array]
"""Queries [b t h p], keys and values [b t g p] of a layer, after positions."""


class Compared(NamedTuple):
    """Plans against dense attention, for each head: float32 [c h].

    Attributes:
      error: mean squared difference of outputs.
      recall: share of the dense attention's mass that the plan keeps, mean over queries.
      tiles: computed, mean over sequences.
    """

    error: Array
    recall: Array
    tiles: Array


def whole(t: int) -> Sight:
    """The sight of a whole text of t tokens."""
    place = jnp.arange(t, dtype=jnp.int32)
    return Sight(place, place[None])


def compare(heads: Heads, choices: Sequence[Chosen], since: int = 0) -> Compared:
    """Each plan against dense attention over a whole text.

    Args:
      heads: of one layer.
      choices: plans for them.
      since: queries before this place are left out: early ones see nearly everything anyway.
    """
    q, k, v = heads
    t, sight = q.shape[1], whole(q.shape[1])
    dense, dense_lse = sparse_attention(q, k, v, causal_lists(t, t, min(256, t), min(512, t)))
    found = []
    for chosen in choices:
        mixed, lse = attend_chosen(q, k, v, chosen, sight)
        gap = (mixed.astype(jnp.float32) - dense.astype(jnp.float32))[:, since:]
        error = jnp.mean(jnp.square(gap), axis=(0, 1, 3))
        recall = jnp.mean(jnp.exp(lse - dense_lse)[:, since:], axis=(0, 1))
        found.append((error, recall, jnp.mean(chosen.tiles().astype(jnp.float32), axis=0)))
    return Compared(*(jnp.stack(part) for part in zip(*found, strict=True)))


def compare_patterns(layers: Sequence[Heads], patterns: Sequence[Any], since: int = 0) -> Compared:
    """`compare` of patterns over layers: [c l h]. Compiles once for all layers of a shape."""
    found = [_compare_layer(heads, tuple(patterns), since) for heads in layers]
    return Compared(*(jnp.stack(part, axis=1) for part in zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _compare_layer(heads: Heads, patterns: tuple[Any, ...], since: int) -> Compared:
    sight = whole(heads[0].shape[1])
    return compare(heads, [pattern.choose(*heads[:2], sight) for pattern in patterns], since)


def fit_slash(layers: Sequence[Heads], pattern: VerticalSlash, tiles: float) -> VerticalSlash:
    """``pattern`` with as many diagonals as cost ``tiles`` a head at most, mean over layers and heads of a text.

    MInference makes candidates of equal cost in the kernel, not of equal counts of lines: what diagonals cost depends
    on how they lie. ``pattern.slash`` is the most that is tried.

    Raises:
      DyncompError: the forced diagonals and the columns cost more already.
    """

    @jax.jit
    def cost(heads: Heads, slash: Array) -> Array:
        chosen = pattern.choose(*heads[:2], whole(heads[0].shape[1]), slash)
        return jnp.mean(chosen.tiles().astype(jnp.float32))

    def total(slash: int) -> float:
        return sum(float(cost(heads, jnp.int32(slash))) for heads in layers) / len(layers)

    low, high = pattern.local, max(pattern.slash, pattern.local) + 1
    if (least := total(low)) > tiles:
        raise DyncompError(
            f"VerticalSlash(vertical={pattern.vertical}, local={low}) costs {least:.0f} tiles, not {tiles:.0f};"
            " take fewer columns"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(middle) <= tiles else (low, middle)
    return dataclasses.replace(pattern, slash=low)
