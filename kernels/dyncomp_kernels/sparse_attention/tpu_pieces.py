"""TPU: what the kernels share: products, pieces of rows and of lists, where blocks lie and go."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.tpu_walk import PIECE, Source

LANES = 128


def divisor(size: int, limit: int, unit: int = 1) -> int:
    """The largest divisor of ``size`` up to ``limit``, a multiple of ``unit`` where there is one."""
    fits = [d for d in range(1, min(size, limit) + 1) if size % d == 0]
    return max([d for d in fits if d % unit == 0] or fits[-1:])


def row_piece(heads: int, rows: int) -> int:
    """Rows of a piece: whole heads, or a part of one."""
    return divisor(rows, PIECE, LANES) if rows > PIECE else rows * divisor(heads, PIECE // rows)


def each_piece(total: int, size: int, run: Callable[[Any], None]) -> None:
    """Calls ``run`` with the first row of every piece; few are unrolled."""
    if total // size <= 2:
        for at in range(0, total, size):
            run(at)
        return
    step = lambda i, _: run(pl.multiple_of(i * size, size))
    lax.fori_loop(0, total // size, step, None)


def parts(entries: int, size: int, width: int) -> list[tuple[int, int, int]]:
    """Parts of blocks behind one another: (first place, places, first block); of long blocks, ``width`` at a time."""
    if size > PIECE:
        return [(at, width, at // size) for at in range(0, entries * size, width)]
    most = max(1, PIECE // size)
    cuts = range(0, entries, most)
    return [(i * size, min(most, entries - i) * size, i) for i in cuts]


def key_piece(columns: int) -> int:
    """Keys of a part of a long block."""
    return divisor(columns, PIECE, LANES)


def wide(x: Array, width: int) -> Array:
    """[n 128], alike in all lanes, as [n width]."""
    if width % LANES == 0:
        return jnp.tile(x, (1, width // LANES))
    return x[:, :width] if width < LANES else x[:, :1]


def blocks(size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``cut`` and ``put`` of a `Source` [s p] in blocks of so many rows."""
    at = lambda i: pl.ds(pl.multiple_of(i * size, size), size)
    return (lambda whole, entry: whole.at[at(entry), :]), (lambda into, i: into.at[at(i), :])


def key_sources(size: Layout, where: tuple[Any, Any], wholes: Any, buffers: Any, semaphores: Any):
    """Keys and values [b g s' p] of one head, and marks of real keys [b s' 128], None where all are."""
    cut, put = blocks(size.columns)
    own = [
        *(x.at[*where] for x in wholes[:2]),
        *(x.at[where[0]] for x in wholes[2:] if x is not None),
    ]
    return [
        Source(whole, whole, buffer, semaphores.at[i], cut, put)
        for i, (whole, buffer) in enumerate(zip(own, buffers, strict=False))
    ]
