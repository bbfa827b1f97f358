"""Which row tiles and groups meet: what the TPU kernels do, step by step.

::

    visits (one grid step each), tile of 4 rows, groups a 6, b 0, c 5; . is unused

    rows   |aaaa|aacc|ccc.|        visit   0    1    2    3    4
    tile    0    1    2            tile    0    1    1    1    2
                                   group   a    a    b    c    c

    weight gradient: the sum over a group's visits; an empty group's one visit writes zeros
    row gradient:    each visit fills its group's rows of the tile; unused rows are one more group, filled with zeros
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax


class Visits(NamedTuple):
    """Tables read before the grid runs: int32 [v] ``group``, ``tile``; [e] ``start``, ``end``; [1] ``total``."""

    group: Array
    tile: Array
    start: Array
    end: Array
    total: Array


def visits(group_sizes: Array, rows: int, tile: int) -> Visits:
    """Every pair of a row tile and a group that meet, in order; an empty group meets one tile."""
    groups, tiles = group_sizes.shape[0], -(-rows // tile)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    first = jnp.minimum(starts // tile, tiles - 1)
    count = jnp.maximum(ends - 1, starts) // tile - starts // tile + 1
    stops = jnp.cumsum(count, dtype=jnp.int32)
    index = jnp.minimum(jnp.arange(tiles + groups, dtype=jnp.int32), stops[-1] - 1)
    group = jnp.sum(stops[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    at = jnp.minimum(first[group] + index - (stops - count)[group], tiles - 1)
    return Visits(group, at, starts, ends, stops[-1:])


def own_rows(v: Array, tables: Visits, tile: int) -> Array:
    """Which rows of the visit's tile are its group's, bool [tile 1]."""
    group = tables.group[v]
    row = tables.tile[v] * tile + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
    return (row >= tables.start[group]) & (row < tables.end[group])
