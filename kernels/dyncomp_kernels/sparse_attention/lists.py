"""Which blocks of keys each block of queries reads: lists that are known at run time only."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks; ``a`` is 1 (all heads read the same), the number of key/value heads, or that of query heads.

    Attributes:
      index: int32 [b a x m], key blocks of query block x, no two alike, in its first places; the rest is anything in
        range.
      count: int32 [b a x], how many count.
      rows: queries a block (static).
      columns: keys a block (static).
      unit: entry i is the block that begins at key i x unit (static); None for ``columns``. With 1 entries are places;
        spans of a list must not overlap, and what lies before the first or behind the last key is left out.
    """

    index: Any  # unchecked: jax also builds trees of cotangents
    count: Any
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    unit: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def listed(self) -> Array:
        """Blocks listed in all, int32 []."""
        return jnp.sum(self.count, dtype=jnp.int32)


def blocks_of(length: int, size: int) -> int:
    """Blocks that cover ``length`` positions."""
    return -(-length // size)


def lists_of(chosen: Array, rows: int, columns: int, most: int | None = None) -> BlockLists:
    """Lists of the blocks that a table names, ascending.

    Args:
      chosen: bool [b a x y]; y is the number of key blocks.
      most: m, longest list; a longer one loses its last blocks. Default y.
    """
    blocks = chosen.shape[-1]
    place = jnp.arange(blocks, dtype=jnp.int32)
    order = jnp.sort(jnp.where(chosen, place, place + blocks), axis=-1, stable=False)
    order = jnp.where(order < blocks, order, order - blocks)
    most = blocks if most is None else min(most, blocks)
    count = jnp.minimum(jnp.sum(chosen, axis=-1, dtype=jnp.int32), most)
    return BlockLists(order[..., :most], count, rows, columns)


def table_of(lists: BlockLists, blocks: int) -> Array:
    """The table bool [b a x y] of some lists of whole blocks."""
    if lists.unit not in (None, lists.columns):
        raise ValueError(
            f"sparse_attention: lists of spans (unit {lists.unit}) have no table of blocks"
        )
    place = jnp.arange(lists.index.shape[-1], dtype=jnp.int32)
    counts = place < lists.count[..., None]
    index = jnp.where(counts, lists.index, blocks)
    hot = jnp.zeros((*lists.count.shape, blocks + 1), bool)
    hot = jnp.put_along_axis(hot, index, True, axis=-1, inplace=False)
    return hot[..., :blocks]


def transposed(lists: BlockLists, key_blocks: int) -> BlockLists:
    """For each key block the query blocks that read it, ascending; rows and columns change places."""
    own = jnp.swapaxes(table_of(lists, key_blocks), -1, -2)
    return lists_of(own, lists.columns, lists.rows)


def causal_lists(t: int, s: int, rows: int, columns: int, offset: int = 0) -> BlockLists:
    """All blocks that hold a key which some query may see; query i stands at ``offset`` + i. [1 1 x m]."""
    last = np.minimum((np.arange(blocks_of(t, rows)) + 1) * rows, t) - 1 + offset
    first_key = np.arange(blocks_of(s, columns)) * columns
    return lists_of(jnp.asarray(first_key <= last[:, None])[None, None], rows, columns)


def a_shape_lists(
    t: int,
    s: int,
    rows: int,
    columns: int,
    *,
    window: int,
    sink: int = 0,
    offset: Array | int = 0,
) -> BlockLists:
    """Blocks that hold one of the first ``sink`` keys or of the ``window`` places up to a query's own. [1 1 x m].

    The first query stands at ``offset``, a run-time value.
    """
    start = jnp.asarray(offset, jnp.int32) + rows * jnp.arange(blocks_of(t, rows), dtype=jnp.int32)
    last = jnp.minimum(start + rows, t + offset) - 1
    first_key = columns * jnp.arange(blocks_of(s, columns), dtype=jnp.int32)[None]
    near = (first_key + columns > start[:, None] - window + 1) | (first_key < sink)
    chosen = near & (first_key <= last[:, None])
    most = blocks_of(window + rows - 1, columns) + 1 + blocks_of(sink, columns)
    return lists_of(chosen[None, None], rows, columns, most)


def check_lists(lists: BlockLists, t: int, s: int) -> None:
    """Looks at the lists themselves, on the host: for tests and for lists that come from outside.

    Raises:
      ValueError: a block outside of the keys, one that is listed twice, spans that overlap, or a count that is none
        or beyond the list.
    """
    index, count = np.asarray(lists.index), np.asarray(lists.count)
    x, y = blocks_of(t, lists.rows), blocks_of(s, lists.columns)
    if index.shape[:-1] != count.shape or count.shape[-1] != x:
        raise ValueError(
            f"sparse_attention: lists of shape {index.shape} and counts of {count.shape}; {t} queries in blocks of"
            f" {lists.rows} need [b a {x} m] and [b a {x}]"
        )
    if count.size and count.min() < 0:
        raise ValueError(f"sparse_attention: a count of {count.min()}; use 0 for an empty list")
    if count.size and count.max() > index.shape[-1]:
        raise ValueError(
            f"sparse_attention: a count of {count.max()} exceeds lists of {index.shape[-1]}"
        )
    spans = lists.unit not in (None, lists.columns)
    for place in np.ndindex(count.shape):
        own = np.sort(index[place][: count[place]])
        if not spans and own.size and (own[0] < 0 or own[-1] >= y):
            bad = own[0] if own[0] < 0 else own[-1]
            raise ValueError(f"sparse_attention: block {bad} is listed, there are {y} key blocks")
        near = np.diff(own) * (lists.unit or lists.columns) < lists.columns
        if near.any():
            what = "spans that overlap" if spans else "a block twice"
            raise ValueError(f"sparse_attention: query block {place} lists {what}; list each once")
