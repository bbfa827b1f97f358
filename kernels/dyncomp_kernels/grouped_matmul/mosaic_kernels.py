"""Bodies of the Mosaic GPU kernels: persistent blocks of one warpgroup take tiles of the result in turn.

Each block multiplies its tile with wgmma out of a pipeline of copies (TMA), and stores the sum through shared memory.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.grouped_matmul.tiles import ALIGNED

LANES = 128
"""Columns of a tile."""

TILE, INNER, STEPS, WIDTH = 128, 64, 4, 8
"""Rows of a tile, depth of a step, steps in flight, column tiles that share the rows in the cache."""

LAYOUT = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
"""As the tensor cores read 16-bit tiles, transposed ones too."""


def product_kernel(transposed: bool, group, base, skip, own, left, right, out) -> None:
    """Forward and row gradient: rows of a tile (`tiles.Tiles`) with their group's matrix; own rows are stored."""
    groups, inner = right.shape[0], left.shape[1]
    grid = group.shape[0], out.shape[1] // LANES
    block = (LANES, INNER) if transposed else (INNER, LANES)

    @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
    def _(info):
        at, column = plgpu.planar_snake(info.index[0], grid, 1, WIDTH)
        first = pl.multiple_of(base[at], ALIGNED)
        place = (lambda i: (column, i)) if transposed else (lambda i: (i, column))

        def multiplied(acc):
            @pl.when((own[at] > 0) & (group[at] < groups))
            def _():
                plgpu.emit_pipeline(
                    lambda _, a, b: plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed else b),
                    grid=(inner // INNER,),
                    in_specs=[
                        plgpu.BlockSpec((TILE, INNER), lambda i: (0, i), delay_release=1),
                        plgpu.BlockSpec(block, place, delay_release=1),
                    ],
                    max_concurrent_steps=STEPS,
                )(left.at[pl.ds(first, TILE)], right.at[jnp.minimum(group[at], groups - 1)])

            return acc[...]

        acc = pl.run_scoped(multiplied, plgpu.ACC((TILE, LANES)))
        columns = pl.ds(column * LANES, LANES)
        _store(acc, skip[at], own[at], lambda row, n: out.at[pl.ds(base[at] + row, n), columns])


def _store(acc, skip, rows, place) -> None:
    """Writes ``rows`` rows of ``acc`` after ``skip``, in copies of 128, 64 ... 1 rows: a copy's size is static."""

    def stored(kept):
        kept[...] = acc.astype(kept.dtype)
        plgpu.commit_smem()
        for size in (1 << i for i in reversed(range(TILE.bit_length()))):

            @pl.when(rows & size != 0)
            def _(size=size):
                row = skip + (rows & (-2 * size))  # after the larger copies
                plgpu.copy_smem_to_gmem(kept.at[pl.ds(row, size)], place(row, size))

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(stored, plgpu.SMEM(acc.shape, jnp.bfloat16))


def weight_kernel(in_flight: int, starts, ends, left, right, out) -> None:
    """Weight gradient: a tile adds up all rows of its group; an empty group's is zero."""
    groups, k, n = out.shape
    grid = k // LANES, n // LANES

    @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm")
    def _(info):
        group = info.index[0]
        tile = plgpu.planar_snake(info.index[1], grid, 1, WIDTH)
        added = lambda acc: _add(acc, starts[group], ends[group], tile, in_flight, left, right)
        acc = pl.run_scoped(added, plgpu.ACC((LANES, LANES)))
        row, column = (pl.ds(i * LANES, LANES) for i in tile)

        def stored(kept):
            kept[...] = acc.astype(kept.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(kept, out.at[group, row, column])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(stored, plgpu.SMEM((LANES, LANES), jnp.bfloat16, transforms=LAYOUT))


def _add(acc, start, end, tile, in_flight, left, right):
    """Adds left^T right over the rows from ``start`` to ``end``; the first step begins at a multiple of 8."""
    skip = lax.rem(start, ALIGNED)
    first = pl.multiple_of(start - skip, ALIGNED)
    size = end - first
    rows = pl.ds(first, left.shape[0])  # reaches past the last row; the steps do not

    def step(index, a, b):
        done = index[0] * INNER

        @pl.when((done < skip) | (done + INNER > size))
        def _():
            _keep(a, skip - done, size - done)
            _keep(b, skip - done, size - done)
            plgpu.commit_smem()

        plgpu.wgmma(acc, a.transpose((1, 0)), b)

    slab = lambda place: plgpu.BlockSpec(
        (INNER, LANES), lambda i: (i, place), delay_release=1, transforms=LAYOUT
    )

    @pl.when(size > skip)
    def _():
        plgpu.emit_pipeline(
            step,
            grid=(lax.div(size + (INNER - 1), INNER),),
            in_specs=[slab(tile[0]), slab(tile[1])],
            max_concurrent_steps=in_flight,
        )(left.at[rows, :], right.at[rows, :])

    return acc[...]


def _keep(slab, begin, end) -> None:
    """Sets all rows to zero but those from ``begin`` to ``end``."""
    index = lax.broadcasted_iota(jnp.int32, slab.shape, 0)
    index = plgpu.layout_cast(index, plgpu.Layout.WGMMA)
    slab[...] = jnp.where((index >= begin) & (index < end), slab[...], jnp.zeros_like(slab))
