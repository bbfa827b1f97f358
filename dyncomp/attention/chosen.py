"""What sparse patterns choose, in one form for all: spans of keys for each block of queries, and single columns."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct

from dyncomp.attention.sight import Sight
from dyncomp.core.typing import Array, Float, Int
from dyncomp_kernels.sparse_attention.api import merged, sparse_attention
from dyncomp_kernels.sparse_attention.columns import column_attention, tiles_of
from dyncomp_kernels.sparse_attention.lists import BlockLists


@struct.dataclass
class Chosen:
    """The plan of a pattern for each query head.

    Attributes:
      spans: lists [b h x m] with ``unit`` 1: entry i is the tile that begins at key i.
      columns: int32 [b h c], keys that all later queries read, no two alike in the first ``count``.
      count: int32 [b h].
    """

    spans: Any  # unchecked: jax also builds trees of shapes
    columns: Any
    count: Any

    def tiles(self, offset: Array | int = 0) -> Int[Array, "b h"]:
        """Tiles of all blocks of queries: spans, and loose columns a tile's width at a time."""
        return jnp.sum(tiles_of(self.spans, self.columns, self.count, offset), axis=-1)

    def executed(self, t: int) -> Int[Array, "b h"]:
        """Pairs that `attend_chosen` computes of t queries: spans, and every entry of ``columns`` for all of them."""
        tile = self.spans.rows * self.spans.columns
        return jnp.sum(self.spans.count, axis=-1) * tile + t * self.columns.shape[-1]


def of_lists(lists: BlockLists, heads: int, batch: int) -> Chosen:
    """The plan of whole blocks; lists for one head are for all."""
    unit = lists.columns if lists.unit is None else lists.unit
    a = lists.index.shape[1]
    wide = lambda x: jnp.broadcast_to(
        jnp.repeat(x, heads // a, axis=1), (batch, heads, *x.shape[2:])
    )
    spans = BlockLists(
        wide(lists.index * unit), wide(lists.count), lists.rows, lists.columns, unit=1
    )
    none = jnp.zeros((batch, heads), jnp.int32)
    return Chosen(spans, jnp.zeros((batch, heads, 0), jnp.int32), none)


def attend_chosen(
    q: Float[Array, "b t h p"], k: Array, v: Array, chosen: Chosen, sight: Sight
) -> tuple[Float[Array, "b t h p"], Float[Array, "b t h"]]:
    """Attention to what is chosen, and the log-sum-exp of its scores."""
    real = jnp.broadcast_to(sight.key_place >= 0, k.shape[:2])
    where = {"offset": sight.place[0], "real": real}
    parts = [sparse_attention(q, k, v, chosen.spans, **where)]
    if chosen.columns.shape[-1]:
        lines = chosen.columns, chosen.count
        parts.append(column_attention(q, k, v, *lines, besides=chosen.spans, **where))
    return merged(parts)


def by_head(choices: Sequence[Chosen], heads: Int[Array, "h"]) -> Chosen:
    """For every head the plan that ``heads`` names, a run-time value."""
    sizes = {(one.spans.rows, one.spans.columns) for one in choices}
    assert len(sizes) == 1, sizes
    ((rows, columns),) = sizes
    pick = lambda parts: jnp.take_along_axis(
        jnp.stack(parts), heads.reshape(1, 1, -1, *[1] * (parts[0].ndim - 2)), axis=0
    )[0]
    index = pick(_padded([one.spans.index for one in choices]))
    count = pick([one.spans.count for one in choices])
    lines = pick(_padded([one.columns for one in choices]))
    return Chosen(
        BlockLists(index, count, rows, columns, unit=1), lines, pick([one.count for one in choices])
    )


def _padded(parts: Sequence[Array]) -> list[Array]:
    """The same last axis for all; what is added does not count."""
    most = max(part.shape[-1] for part in parts)
    widths = lambda part: [(0, 0)] * (part.ndim - 1) + [(0, most - part.shape[-1])]
    return [jnp.pad(part, widths(part)) for part in parts]
