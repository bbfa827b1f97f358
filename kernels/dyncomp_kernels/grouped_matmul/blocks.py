"""Which rows the portable form multiplies together: blocks of a few static sizes, as large as each group allows.

::

    group sizes 150, 20, 70; block sizes 16, 32, 48 ... 128

    rows   |aaaaaaaa ... aaaaaa|bb|ccccccc|......|
    whole   a: 128 rows                              blocks of the largest size, while more rows than that remain
    last                a: 32    b: 32  c: 80        the rest of each group: the smallest size that covers it

Every group in use has exactly one last block, so a pass over the last blocks meets each group once. A last block
reaches into the next group (b's over c's rows here); what it computes there is not kept.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

STEPS = 12
MIN_STEP = 16
MAX_STEP = 32


class Sweep(NamedTuple):
    """The blocks of one size: entries ``begin`` to ``stop`` of tables.

    Attributes:
      block: static rows a block.
      whole: static, whether every block belongs to its group with all its rows.
      begin, stop: int32 scalars.
      group, start, end: int32 [c], the block's group, its first row, and the row after its last own one.
    """

    block: int
    whole: bool
    begin: Array
    stop: Array
    group: Array
    start: Array
    end: Array


def block_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Static sizes, ascending: up to `STEPS` multiples of a quarter of an even group, until 1.5 even groups.

    The step is a power of two between 16 and 32; a group wastes half a step in the mean, an eighth of its rows where it
    is an even one, less where groups are large. More sizes cost compile time, and fewer, larger steps cost padding.
    """
    even = max(rows // groups, 1)
    step = min(MAX_STEP, max(MIN_STEP, 1 << (max(even // 4, 1).bit_length() - 1)))
    steps = min(STEPS, -(-3 * even // (2 * step)))
    return tuple(sorted({min(step * i, rows) for i in range(1, steps + 1)}))


def _last(group_sizes: Array, sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """Whole blocks before a group's last one, and the index of the last one's size; int32 [e], index -1 if empty."""
    whole = jnp.maximum(group_sizes - 1, 0) // sizes[-1]
    rest = group_sizes - whole * sizes[-1]
    limits = jnp.asarray((0, *sizes[:-1]), jnp.int32)
    return whole, jnp.sum(rest[:, None] > limits[None, :], axis=1, dtype=jnp.int32) - 1


def trips(group_sizes: Array, rows: int) -> tuple[tuple[int, Array], ...]:
    """How many blocks of each size the loops run: (size, int32 scalar), last blocks by size, then the whole ones."""
    sizes = block_sizes(rows, group_sizes.shape[0])
    whole, last = _last(group_sizes, sizes)
    counts = [(size, jnp.sum(last == i, dtype=jnp.int32)) for i, size in enumerate(sizes)]
    return (*counts, (sizes[-1], jnp.sum(whole, dtype=jnp.int32)))


def executed_rows(group_sizes: Array, rows: int) -> Array:
    """Rows that the loops multiply, padding of last blocks included; int32 scalar."""
    if rows == 0:
        return jnp.zeros((), jnp.int32)
    sizes = jnp.asarray((*block_sizes(rows, group_sizes.shape[0]), 0), jnp.int32)
    whole, last = _last(group_sizes, block_sizes(rows, group_sizes.shape[0]))
    return jnp.sum(whole * sizes[-2] + sizes[last], dtype=jnp.int32)


def sweeps(group_sizes: Array, rows: int) -> tuple[Sweep, ...]:
    """One pass a block size: last blocks first (each group in use once), then the whole blocks.

    Args:
      group_sizes: int32 [e], sum <= rows.
      rows: static, at least 1.
    """
    sizes = block_sizes(rows, group_sizes.shape[0])
    whole, last = _last(group_sizes, sizes)
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    group = jnp.argsort(last).astype(jnp.int32)
    start = (ends - group_sizes + whole * sizes[-1])[group]
    bounds = jnp.sum(last[:, None] < jnp.arange(len(sizes) + 1)[None, :], axis=0, dtype=jnp.int32)
    tables = group, start, ends[group]
    found = [Sweep(size, False, bounds[i], bounds[i + 1], *tables) for i, size in enumerate(sizes)]
    capacity = rows // sizes[-1]
    return (*found, _whole(whole, ends - group_sizes, sizes[-1], capacity))


def _whole(whole: Array, starts: Array, block: int, capacity: int) -> Sweep:
    """The blocks that lie inside their groups, in row order."""
    ends = jnp.cumsum(whole, dtype=jnp.int32)
    index = jnp.arange(capacity, dtype=jnp.int32)
    group = jnp.sum(ends[None, :] <= index[:, None], axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, whole.shape[0] - 1)
    start = starts[group] + (index - (ends - whole)[group]) * block
    return Sweep(block, True, jnp.zeros_like(ends[-1]), ends[-1], group, start, start + block)
