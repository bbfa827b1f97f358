"""Bodies of the wide Mosaic GPU kernels: persistent blocks of three warpgroups take tiles of 128 x 256 in turn.

::

    a tile of the result                    the third warpgroup copies (TMA) what coming steps read, also those of the
    |  warpgroup 0: rows  0 ..  63  |       next tile; the two others multiply (wgmma), each its half of the rows, and
    |  warpgroup 1: rows 64 .. 127  |       store the sums while the next tile's first products run

Two blocks may be a pair (a cluster): they take two tiles that share an operand, and each copies half of it for both.
A product takes group after group, so that the weights of each are read from memory about once::

    columns   0  1     2  3            a group of five row tiles and the order of its tiles; those of a pair have one
    row 0   | 0  1  |  5  6  | ..      number: two row tiles share the weights of a column, and the last one of an odd
    row 1   | 0  1  |  5  6  |         number is shared by two columns
    row 2   | 2  3  |  7  8  |
    row 3   | 2  3  |  7  8  |
    row 4   | 4  4  |  9  9  |

Every tile is multiplied whole, a group's last one too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.grouped_matmul.mosaic_kernels import INNER, LAYOUT, TILE
from dyncomp_kernels.grouped_matmul.tiles import ALIGNED

WIDE, HALF, CHUNK = 256, 64, 64
"""Columns of a tile, rows of a warpgroup's half, columns that are stored at once."""

STEPS = 4
"""Steps in flight."""

BAND, WIDTH, NARROW = 8, 16, 8
"""Row tiles that share weights in the cache, column tiles that share rows, and these of a weight gradient."""

HALVES, COPIER, REGISTERS = 2, 2, (232, 40)
"""Warpgroups that multiply, index of the one that copies, registers of their threads and of its."""

PART, PAIR = "part", "pair"
"""Names of the axes of warpgroups and of the blocks of a pair."""

ROWWISE = plgpu.TilingTransform((1, CHUNK)), plgpu.SwizzleTransform(128)
"""As the copy engine takes any row to begin with."""


class Tile(NamedTuple):
    """What a block does for one tile.

    Attributes:
      steps: int32, how many slabs are multiplied.
      copy: of (step, memory for the left slab, for the right one, barrier that counts both).
      store: of the sums of a half [64 256], the memory that copies start from, and the first of 64 columns to store.
    """

    steps: Any
    copy: Callable[..., None]
    store: Callable[..., None]


def product_kernel(
    transposed: bool, paired: bool, live, group, base, skip, own, first, many, left, right, out
):
    """Forward and row gradient: rows of a tile (`tiles.Tiles`) with their group's matrix; own rows are stored.

    A pair of blocks takes two row tiles of a group and one column tile, whose weights each copies half of for both;
    the last row tile of an odd number and two column tiles, whose rows they share.
    """
    groups, inner = right.shape[0], left.shape[1]
    columns = out.shape[1] // WIDE // (1 + paired)

    def tile(index) -> Tile:
        at, column, lone = _place_in_group(
            index, first, many, columns, WIDTH // (1 + paired), paired
        )
        weights = right.at[jnp.minimum(group[at], groups - 1)]
        rows, across = pl.ds(pl.multiple_of(base[at], ALIGNED), TILE), pl.ds(column * WIDE, WIDE)

        def copy(step, a, b, barrier):
            inside = pl.ds(step * INNER, INNER)
            place = (across, inside) if transposed else (inside, across)

            def both(left_axes, right_axes):
                plgpu.copy_gmem_to_smem(
                    left.at[rows, inside], a, barrier, collective_axes=left_axes
                )
                plgpu.copy_gmem_to_smem(weights.at[place], b, barrier, collective_axes=right_axes)

            if lone is None:
                both(None, None)
            else:
                pl.when(lone)(lambda: both(PAIR, None))
                pl.when(jnp.logical_not(lone))(lambda: both(None, PAIR))

        half = lax.axis_index(PART) * HALF
        top = jnp.clip(skip[at] - half, 0, HALF)
        count = jnp.clip(skip[at] + own[at] - half, 0, HALF) - top

        def store(total, kept, i):
            place = lambda row, n: out.at[
                pl.ds(base[at] + half + row, n), pl.ds(column * WIDE + i, CHUNK)
            ]
            _store_rows(_fill(kept, total, i), top, count, place)

        steps = jnp.where(group[at] < groups, inner // INNER, 0)
        return Tile(steps, copy, store)

    def operands(a, b):
        mine = a.at[pl.ds(lax.axis_index(PART) * HALF, HALF)]
        return mine, b.transpose((1, 0)) if transposed else b

    slabs = (TILE, INNER), (WIDE, INNER) if transposed else (INNER, WIDE)
    _persistent(live[0] * columns, tile, operands, slabs, ROWWISE, left.dtype, paired)


def weight_kernel(paired: bool, starts, ends, left, right, left_edges, right_edges, out) -> None:
    """Weight gradient: a tile adds up all rows of its group; an empty group's is zero.

    A group's first and last step come out of ``left_edges`` and ``right_edges``, without other groups' rows
    (`edges`).
    """
    groups, k, n = out.shape
    grid = k // TILE // (1 + paired), n // WIDE
    shared = PAIR if paired else None

    def tile(index) -> Tile:
        group, inside = lax.div(index, grid[0] * grid[1]), lax.rem(index, grid[0] * grid[1])
        row, column = _place(inside, *grid, NARROW)
        if paired:
            row = 2 * row + lax.axis_index(PAIR)
        first, steps = span(starts[group], ends[group])
        down, across = pl.ds(row * TILE, TILE), pl.ds(column * WIDE, WIDE)

        def copy(step, a, b, barrier):
            def pair(x, y, begin):
                rows = pl.ds(begin, INNER)
                plgpu.copy_gmem_to_smem(x.at[rows, down], a, barrier)
                plgpu.copy_gmem_to_smem(y.at[rows, across], b, barrier, collective_axes=shared)

            edge = (step == 0) | (step == steps - 1)
            last = jnp.where(step == 0, 0, 1)

            @pl.when(edge)
            def _():
                pair(left_edges, right_edges, (2 * group + last) * INNER)

            @pl.when(jnp.logical_not(edge))
            def _():
                pair(left, right, pl.multiple_of(first + step * INNER, ALIGNED))

        def store(total, kept, i):
            rows = pl.ds(row * TILE + lax.axis_index(PART) * HALF, HALF)
            slot = _fill(kept, total, i)
            plgpu.copy_smem_to_gmem(slot, out.at[group, rows, pl.ds(column * WIDE + i, CHUNK)])

        return Tile(steps, copy, store)

    def operands(a, b):
        return a.at[:, pl.ds(lax.axis_index(PART) * HALF, HALF)].transpose((1, 0)), b

    slabs = (INNER, TILE), (INNER, WIDE)
    _persistent(groups * grid[0] * grid[1], tile, operands, slabs, LAYOUT, left.dtype, paired)


def span(start, end):
    """First row that the steps of a group read, a multiple of 8, and how many steps of 64 rows there are."""
    first = start - lax.rem(start, jnp.int32(ALIGNED))
    return first, jnp.where(end > start, lax.div(end - first + (INNER - 1), jnp.int32(INNER)), 0)


def edges(rows, starts, ends):
    """The first 64 and the last 64 rows that a group's steps read, with zeros for other groups' rows: [e 2 64 ...]."""
    first, steps = span(starts, ends)
    begin = jnp.stack([first, first + jnp.maximum(steps - 1, 0) * INNER], axis=1)
    index = begin[..., None] + jnp.arange(INNER, dtype=jnp.int32)
    own = (index >= starts[:, None, None]) & (index < ends[:, None, None])
    taken = rows[jnp.minimum(index, rows.shape[0] - 1)]
    return jnp.where(own[..., None], taken, 0).reshape(-1, rows.shape[1])


def _place_in_group(index, first, many, columns: int, width: int, paired: bool):
    """Row tile and column tile of the ``index``-th task, and whether a pair of blocks shares its rows.

    Group after group, so that its weights are read once; in planes of ``width`` columns, in bands of `BAND` row tiles,
    column after column, all row tiles of a band one after the other; every second plane in reverse.
    """
    some = lax.div(index, columns)  # a row tile of the group
    begin, rows = first[some], many[some]
    inside = index - begin * columns
    plane = lax.div(inside, rows * width)
    wide = jnp.minimum(columns - plane * width, width)
    inside = inside - plane * (rows * width)
    inside = jnp.where(lax.rem(plane, 2) == 1, rows * wide - 1 - inside, inside)
    band = lax.div(inside, BAND * wide)
    inside = inside - band * (BAND * wide)
    tall = jnp.minimum(rows - band * BAND, BAND)
    column = lax.div(inside, tall)
    row = inside - column * tall
    begin, column = begin + band * BAND, plane * width + column
    if not paired:
        return begin + row, column, None
    me, odd = lax.axis_index(PAIR), lax.rem(row, 2)
    lone = (odd == 0) & (row == tall - 1)
    at = begin + jnp.where(lone, row, row - odd + me)
    return at, 2 * column + jnp.where(lone, me, odd), lone


def _place(index, rows, columns: int, width: int):
    """Row and column of the ``index``-th tile: planes of ``width`` columns, to and fro over the rows."""
    plane = lax.div(index, rows * width)
    inside = index - plane * (rows * width)
    wide = jnp.minimum(columns - plane * width, width)
    row = lax.div(inside, wide)
    column = plane * width + inside - row * wide
    return jnp.where(lax.rem(plane, 2) == 1, rows - 1 - row, row), column


def _persistent(count, tile, operands, slabs, layout, dtype, paired: bool) -> None:
    """Runs the block's share of ``count`` tiles."""
    mine, blocks = lax.axis_index("sm"), lax.axis_size("sm")
    turns = lax.div(count - mine + (blocks - 1), blocks)

    def roles(a, b, kept, filled, free):
        slot = lambda step: lax.rem(step, STEPS)

        def copies():
            plgpu.set_max_registers(REGISTERS[1], action="decrease")

            def fill(i, begun):
                do = tile(mine + i * blocks)

                def step(j, _):
                    at = slot(begun + j)

                    @pl.when(begun + j >= STEPS)
                    def _():
                        plgpu.barrier_wait(free.at[at])

                    do.copy(j, a.at[at], b.at[at], filled.at[at])

                lax.fori_loop(0, do.steps, step, None)
                return begun + do.steps

            begun = lax.fori_loop(0, turns, fill, jnp.int32(0))
            drain = lambda j, _: plgpu.barrier_wait(free.at[slot(j)])
            lax.fori_loop(jnp.maximum(begun - STEPS, 0), begun, drain, None)

        def products():
            plgpu.set_max_registers(REGISTERS[0], action="increase")

            own = kept.at[lax.axis_index(PART)]
            chunks = tuple(enumerate(range(0, WIDE, CHUNK)))

            def multiply(i, carry):
                begun, before = carry
                do, last = (tile(mine + jnp.maximum(at, 0) * blocks) for at in (i, i - 1))

                def store(wanted):
                    for number, column in chunks:

                        @pl.when((i > 0) & wanted(number))
                        def _(column=column):
                            last.store(before, own, column)

                def steps(acc):
                    def step(j, _):
                        at = slot(begun + j)
                        plgpu.barrier_wait(filled.at[at])
                        plgpu.wgmma(acc, *operands(a.at[at], b.at[at]))
                        store(lambda number: j == number)
                        plgpu.wgmma_wait(1)

                        @pl.when(j > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[slot(begun + j - 1)])

                    lax.fori_loop(0, do.steps, step, None)
                    total = acc[...]

                    @pl.when(do.steps > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[slot(begun + do.steps - 1)])

                    return total.astype(dtype)

                total = pl.run_scoped(steps, plgpu.ACC((HALF, WIDE)))
                store(lambda number: number >= do.steps)
                return begun + do.steps, total

            none = jnp.zeros((HALF, WIDE), dtype)
            _, total = lax.fori_loop(0, turns, multiply, (jnp.int32(0), none))

            @pl.when(turns > 0)
            def _():
                for _, column in chunks:
                    tile(mine + (turns - 1) * blocks).store(total, own, column)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(lax.axis_index(PART) == COPIER, copies, products)

    free = {"num_arrivals": HALVES, "num_barriers": STEPS}
    pl.run_scoped(
        roles,
        *(plgpu.SMEM((STEPS, *slab), dtype, transforms=LAYOUT) for slab in slabs),
        plgpu.SMEM((HALVES, HALF, CHUNK), dtype, transforms=layout),
        plgpu.Barrier(num_arrivals=len(slabs), num_barriers=STEPS),
        plgpu.ClusterBarrier(collective_axes=(PAIR,), **free) if paired else plgpu.Barrier(**free),
        collective_axes=PART,
    )


def _store_rows(slot, top, count, place) -> None:
    """Writes ``count`` rows of ``slot`` from ``top`` on, in copies of 64, 32 ... 1 rows: a copy's size is static."""
    for size in (1 << bit for bit in reversed(range(HALF.bit_length()))):

        @pl.when(count & size != 0)
        def _(size=size):
            row = top + (count & (-2 * size))  # after the larger copies
            plgpu.copy_smem_to_gmem(slot.at[pl.ds(row, size)], place(row, size), commit_group=False)

    plgpu.commit_smem_to_gmem_group()


def _fill(kept, total, i: int):
    """The memory that holds the chunk of ``total`` from column ``i``, once the copies before have read theirs."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    kept[...] = total[:, i : i + CHUNK]
    plgpu.commit_smem()
    return kept
