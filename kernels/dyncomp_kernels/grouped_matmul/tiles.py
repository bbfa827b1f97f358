"""Row tiles of the Mosaic GPU kernels: a group's first tile begins where the group does, but for up to 7 rows.

::

    groups a 10, b 0, c 19 of 31 rows; tiles of 16 rows; . is unused, one more group

    rows    |aaaaaaaaaacccccccccccccccccccc..|         tile    0    1    2    (3 .. : capacity)
    tiles   |       0       |                         group   a    c    .
                    |       1       |  ...            base    0    8   24
                                                      skip    0    2    5
    Hopper copies tiles of 8 rows into swizzled       rows   10   14    2
    memory, so a base is a multiple of 8.

A tile is loaded whole, and only its own rows (``rows`` of them after ``skip``) are stored. So a group wastes half a
tile in the mean; tiles at fixed rows, as in jax's kernel, cut most groups once more.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

ALIGNED = 8


class Tiles(NamedTuple):
    """int32 [c] each.

    Attributes:
      group: e for unused rows.
      base: first row.
      skip, rows: rows that are not the group's, and own rows after them.
      first, many: the group's first tile, and how many it has.
    """

    group: Array
    base: Array
    skip: Array
    rows: Array
    first: Array
    many: Array


def tiles(group_sizes: Array, rows: int, tile: int) -> Tiles:
    """The tiles of every group and of the unused rows, in row order; those past the last have no rows.

    Args:
      group_sizes: int32 [e], sum <= rows.
      rows: static.
      tile: static rows a tile, a multiple of 8.
    """
    sizes = jnp.append(group_sizes, rows - jnp.sum(group_sizes, dtype=jnp.int32))
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    starts = ends - sizes
    first = starts - starts % ALIGNED
    count = jnp.where(sizes > 0, -((first - ends) // tile), 0)
    stops = jnp.cumsum(count, dtype=jnp.int32)
    capacity = (rows + sizes.shape[0] * (tile + ALIGNED - 2)) // tile
    index = jnp.arange(capacity, dtype=jnp.int32)
    group = jnp.sum(stops[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, sizes.shape[0] - 1)
    own_first = (stops - count)[group]
    base = first[group] + (index - own_first) * tile
    skip = jnp.maximum(starts[group] - base, 0)
    own = jnp.clip(ends[group] - base, 0, tile) - skip
    return Tiles(group, base, skip, own, own_first, count[group])
