"""TPU: which pairs of a piece of scores are seen, and whether all are."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.scores import NT, dot
from dyncomp_kernels.sparse_attention.tpu_pieces import LANES


def all_seen(size: Layout, place: Array, begins: list[Array]) -> Array:
    """Whether queries at ``place`` .. ``place`` + rows - 1 see every key of the blocks; without padding."""
    rule, seen = size.seeing, jnp.bool_(True)
    last = place + (size.rows - 1)
    for begin in begins:
        end = begin + size.columns
        seen = seen & (end <= size.s)
        if rule.causal:
            seen = seen & (end - 1 <= place)
        if rule.window is not None:
            seen = seen & ((begin > last - rule.window) | (end <= rule.sink))
    return seen


def along(begins: list[Any], width: int, axis: int) -> Array:
    """Places begin .. begin + width - 1 of each, behind one another: int32 [1 ..] (axis 1) or [.. 1] (axis 0)."""
    shape = (1, width * len(begins)) if axis else (width * len(begins), 1)
    at = lax.broadcasted_iota(jnp.int32, shape, axis)
    found = at + begins[0]
    for number, begin in enumerate(begins[1:], 1):
        found = jnp.where(at >= number * width, at + (begin - number * width), found)
    return found


def query_places(size: Layout, place: Array, at: Any, piece: int, axis: int) -> Array:
    """Places of ``piece`` rows from row ``at`` of a block whose heads all begin at ``place``."""
    if piece >= size.rows:
        return along([place] * (piece // size.rows), size.rows, axis)
    return along([place + lax.rem(jnp.int32(at), jnp.int32(size.rows))], piece, axis)


def real_lanes(marks: Array) -> Array:
    """Marks [k 128], keys in sublanes, as bool [1 k], keys in lanes: the matrix unit turns them."""
    return dot(jnp.ones((16, LANES), marks.dtype), marks, NT)[:1] > 0


def key_places(size: Layout, begins: list[Array], cut: tuple[int, int, int]) -> Array:
    """Places of the keys of a part of listed blocks, int32 [1 k]."""
    at, width, first = cut
    if width < size.columns:
        return along([begins[first] + at % size.columns], width, 1)
    return along(begins[first : first + width // size.columns], size.columns, 1)
