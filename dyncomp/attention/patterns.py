"""Sparse patterns of prefill: which pairs a mixer computes, chosen for each input, without a table of all scores.

A pattern is a frozen dataclass of static choices; ``Attention.pattern`` names its factory. It is given queries, keys,
values and a `Sight`, whose slots must lie in the order of their places, and returns what `attend` would of the pairs it
chose, and how many pairs of each sequence and head it computed.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from dyncomp.attention.attend import attend_seen
from dyncomp.attention.selection import (
    best,
    best_blocks,
    pooled_scores,
    recent_attention,
    slash_scores,
    vertical_scores,
)
from dyncomp.attention.sight import Sight
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float
from dyncomp_kernels.sparse_attention.api import merged, sparse_attention
from dyncomp_kernels.sparse_attention.columns import column_attention
from dyncomp_kernels.sparse_attention.lists import (
    BlockLists,
    a_shape_lists,
    blocks_of,
    lists_of,
)
from dyncomp_kernels.sparse_attention.spans import slash_spans


@runtime_checkable
class Pattern(Protocol):
    """What `Attention.pattern` makes."""

    def __call__(
        self, q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight
    ) -> tuple[Float[Array, "b t h p"], Array]:
        """Mixed values, and pairs computed, a mean over heads: float32 []."""
        ...


@dataclasses.dataclass(frozen=True)
class AShape:
    """The first ``sink`` keys and the ``window`` places up to a query's own (StreamingLLM, arXiv 2309.17453).

    Attributes:
      window, sink: in tokens; exact.
      tile: queries and keys of a block.
    """

    window: int
    sink: int = 0
    tile: int = 64

    def __post_init__(self):
        if self.window < 1 or self.sink < 0:
            raise DyncompError(
                f"AShape.window={self.window}, sink={self.sink}: use at least 1 and 0"
            )

    def __call__(self, q, k, v, sight):
        """The same blocks for all heads; their lists are as long as the longest needs."""
        words = {"window": self.window, "sink": self.sink}
        sizes = q.shape[1], k.shape[1], self.tile, self.tile
        lists = a_shape_lists(*sizes, **words, offset=sight.place[0])
        mixed, _ = sparse_attention(q, k, v, lists, **words, **_where(sight, k))
        return mixed, _pairs(lists)


@dataclasses.dataclass(frozen=True)
class TopBlocks:
    """The blocks of keys whose mean goes best with the mean of a block of queries (MInference's block-sparse head).

    Attributes:
      blocks: how many a block of queries reads.
      tile: queries and keys of a block.
      sink, local: so many first blocks, and blocks up to the query's own, are always among them. The released code
        forces neither; without the diagonal, texts suffer.
    """

    blocks: int
    tile: int = 64
    sink: int = 1
    local: int = 1

    def __call__(self, q, k, v, sight):
        """Lists of their own for each head."""
        size = self.tile
        start = size * jnp.arange(blocks_of(q.shape[1], size), dtype=jnp.int32) + sight.place[0]
        last = jnp.minimum(start + size - 1, sight.place[-1])[:, None]
        first = size * jnp.arange(blocks_of(k.shape[1], size), dtype=jnp.int32)
        causal = first[None] <= last
        own = (last - first[None]) // size
        forced = (first[None] < self.sink * size) | (own < self.local)
        scores = pooled_scores(q, k, size, size)
        chosen = best_blocks(scores, self.blocks, causal, forced)
        lists = lists_of(chosen, size, size, self.blocks)
        mixed, _ = sparse_attention(q, k, v, lists, **_where(sight, k))
        return mixed, _pairs(lists)


@dataclasses.dataclass(frozen=True)
class VerticalSlash:
    """Columns and diagonals that the newest queries look at (MInference's vertical-slash head, arXiv 2407.02490).

    Attributes:
      vertical: columns, the first ``sink`` always among them.
      slash: diagonals, the offsets 0 .. ``local`` - 1 always among them.
      probe: queries whose attention is looked at.
      tile: queries and keys of a block; a diagonal is read as spans of so many keys.
    """

    vertical: int
    slash: int
    probe: int = 64
    sink: int = 30
    local: int = 100
    tile: int = 64

    def __post_init__(self):
        if self.local < 1 or self.vertical < 1 or self.slash < 1:
            raise DyncompError(
                f"VerticalSlash: vertical={self.vertical}, slash={self.slash}, local={self.local}; use at least 1 each"
            )

    def __call__(self, q, k, v, sight):
        """Spans of the diagonals and the columns that no span holds, merged by their log-sum-exps."""
        t, s = q.shape[1], k.shape[1]
        offset, end = sight.place[0], sight.place[-1] + 1
        columns, (offsets, count) = self._chosen(q, k, sight, end)
        spans = slash_spans(offsets, count, t, self.tile, keys=s, start=offset)
        where = _where(sight, k)
        diagonals = sparse_attention(q, k, v, spans, **where)
        lines = column_attention(q, k, v, *columns, besides=spans, **where)
        mixed, _ = merged([diagonals, lines])
        extra = jnp.mean(columns[1].astype(jnp.float32)) * t
        return mixed, _pairs(spans) + extra

    def _chosen(self, q: Array, k: Array, sight: Sight, end: Array) -> Any:
        """(columns, count) and (offsets descending, count) of each head."""
        probe = min(self.probe, q.shape[1])
        place = sight.place[-probe:]
        weights = recent_attention(q[:, -probe:], k, place, _real(sight, k))
        vertical = max(self.vertical, self.sink)
        columns, columns_count = best(vertical_scores(weights), vertical, vertical, self.sink, end)
        columns = jnp.minimum(columns, k.shape[1] - 1)
        slash = max(self.slash, self.local)
        offsets, count = best(slash_scores(weights, place), slash, slash, self.local, end)
        return (columns, columns_count), (_descending(offsets, count), count)


@dataclasses.dataclass(frozen=True)
class PerHead:
    """Another pattern for each head (MInference's assignment).

    Attributes:
      patterns: what there is.
      heads: for each query head the index of its pattern.
    """

    patterns: tuple[Any, ...]
    heads: tuple[int, ...]

    def __call__(self, q, k, v, sight):
        """Pattern by pattern, over its heads."""
        (h, g), parts, order, total = (q.shape[2], k.shape[2]), [], [], jnp.float32(0)
        if len(self.heads) != h or not all(0 <= i < len(self.patterns) for i in self.heads):
            raise DyncompError(
                f"PerHead.heads={self.heads}: give one of {len(self.patterns)} patterns to each of {h} heads"
            )
        for index, pattern in enumerate(self.patterns):
            own = [head for head, chosen in enumerate(self.heads) if chosen == index]
            if not own:
                continue
            keys = jnp.asarray([head // (h // g) for head in own])
            mixed, pairs = pattern(q[:, :, jnp.asarray(own)], k[:, :, keys], v[:, :, keys], sight)
            parts.append(mixed)
            order += own
            total = total + pairs * len(own) / h
        back = jnp.argsort(jnp.asarray(order))
        return jnp.concatenate(parts, axis=2)[:, :, back], total


def head_errors(
    q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight, patterns: tuple[Any, ...]
) -> tuple[Float[Array, "c h"], Float[Array, "c"]]:
    """Mean squared difference of each pattern's output from dense attention's, for each head, and each one's pairs.

    The least of a column is the pattern that MInference's offline search gives the head, on candidates of equal cost.
    """
    dense, _ = attend_seen(q, k, v, sight)
    errors, pairs = [], []
    for pattern in patterns:
        mixed, computed = pattern(q, k, v, sight)
        gap = mixed.astype(jnp.float32) - dense.astype(jnp.float32)
        errors.append(jnp.mean(jnp.square(gap), axis=(0, 1, 3)))
        pairs.append(computed)
    return jnp.stack(errors), jnp.stack(pairs)


def _descending(index: Array, count: Array) -> Array:
    """The first ``count`` entries of ascending places turned round."""
    at = count[..., None] - 1 - jnp.arange(index.shape[-1], dtype=jnp.int32)
    return jnp.take_along_axis(index, jnp.maximum(at, 0), axis=-1)


def _where(sight: Sight, k: Array) -> dict[str, Any]:
    return {"offset": sight.place[0], "real": _real(sight, k)}


def _real(sight: Sight, k: Array) -> Array:
    """Which slots hold a token, bool [b s]."""
    return jnp.broadcast_to(sight.key_place >= 0, k.shape[:2])


def _pairs(lists: BlockLists) -> Array:
    """Pairs in listed blocks, mean over lists and sequences."""
    each = jnp.mean(jnp.sum(lists.count, axis=-1).astype(jnp.float32))
    return each * (lists.rows * lists.columns)
