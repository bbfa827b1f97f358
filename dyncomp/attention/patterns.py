"""Sparse patterns of prefill: which pairs a mixer computes, chosen for each input, without a table of all scores.

A pattern is a frozen dataclass of static choices; ``Attention.pattern`` names its factory. It is given queries, keys,
values and a `Sight`, whose slots must lie in the order of their places, and returns what `attend` would of the pairs it
chose, and how many pairs of each sequence and head it computed.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.attention.asked import pick
from dyncomp.attention.attend import attend_seen
from dyncomp.attention.chosen import Chosen, attend_chosen, of_lists
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
from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import (
    BlockLists,
    a_shape_lists,
    blocks_of,
    lists_of,
)
from dyncomp_kernels.sparse_attention.spans import slash_spans


@runtime_checkable
class Pattern(Protocol):
    """What `Attention.pattern` makes.

    Under a mesh each device calls it for sequences and heads of its own; ``heads_together = True`` keeps all heads of a
    sequence on one device.
    """

    def __call__(
        self, q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight
    ) -> tuple[Float[Array, "b t h p"], Array]:
        """Mixed values, and pairs computed, those that choosing looked at included, a mean over heads: float32 []."""
        ...


def check_tile(pattern: Any) -> None:
    """Refuses a pattern whose blocks hold nothing.

    Raises:
      DyncompError: names the attribute.
    """
    if pattern.tile < 1:
        raise DyncompError(f"{type(pattern).__name__}.tile={pattern.tile}: use at least 1")


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
        check_tile(self)

    def __call__(self, q, k, v, sight):
        """The same blocks for all heads; their lists are as long as the longest needs."""
        words = {"window": self.window, "sink": self.sink}
        sizes = q.shape[1], k.shape[1], self.tile, self.tile
        lists = a_shape_lists(*sizes, **words, offset=sight.place[0])
        mixed, _ = sparse_attention(q, k, v, lists, **words, **_where(sight, k))
        return mixed, _pairs(lists)

    def choose(self, q: Array, k: Array, sight: Sight) -> Chosen:
        """Whole blocks, more than the exact tokens: what a kernel computes anyway."""
        sizes = q.shape[1], k.shape[1], self.tile, self.tile
        lists = a_shape_lists(*sizes, window=self.window, sink=self.sink, offset=sight.place[0])
        return of_lists(lists, q.shape[2], q.shape[0])

    def looks(self, t: int, s: int) -> int:
        """None: nothing is looked at."""
        del t, s
        return 0


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

    def __post_init__(self):
        if self.blocks < max(self.sink + self.local, 1) or min(self.sink, self.local) < 0:
            raise DyncompError(
                f"{type(self).__name__}.blocks={self.blocks}, sink={self.sink}, local={self.local}: use at least one"
                " block, and as many as those forced"
            )
        check_tile(self)

    def __call__(self, q, k, v, sight):
        """Lists of their own for each head."""
        lists = self._lists(q, k, sight)
        mixed, _ = sparse_attention(q, k, v, lists, **_where(sight, k))
        return mixed, _pairs(lists) + self.looks(q.shape[1], k.shape[1])

    def choose(self, q: Array, k: Array, sight: Sight) -> Chosen:
        """The lists alone."""
        return of_lists(self._lists(q, k, sight), q.shape[2], q.shape[0])

    def looks(self, t: int, s: int) -> int:
        """Products of queries and keys that choosing costs a head."""
        return blocks_of(t, self.tile) * blocks_of(s, self.tile)

    def _lists(self, q: Array, k: Array, sight: Sight) -> BlockLists:
        size = self.tile
        start = size * jnp.arange(blocks_of(q.shape[1], size), dtype=jnp.int32) + sight.place[0]
        last = jnp.minimum(start + size - 1, sight.ends()[:, None] - 1)[:, None, :, None]
        first = size * jnp.arange(blocks_of(k.shape[1], size), dtype=jnp.int32)
        causal = first <= last
        own = (last - first) // size
        forced = (first < self.sink * size) | (own < self.local)
        chosen = best_blocks(self._scores(q, k, sight), self.blocks, causal, forced)
        return lists_of(chosen, size, size, self.blocks)

    def _scores(self, q: Array, k: Array, sight: Sight) -> Float[Array, "b h x y"]:
        asked = sight.place[None] < sight.ends()[:, None]
        return pooled_scores(q, k, self.tile, self.tile, (asked, _real(sight, k)))


@dataclasses.dataclass(frozen=True)
class RandomBlocks(TopBlocks):
    """`TopBlocks` with scores drawn at random: the control.

    Attributes:
      seed: of the draw, which one number of the queries makes another in each layer and for each input.
    """

    seed: int = 0

    def looks(self, t: int, s: int) -> int:
        """None."""
        del t, s
        return 0

    def _scores(self, q: Array, k: Array, sight: Sight) -> Float[Array, "b h x y"]:
        """As many as `pooled_scores` gives."""
        del sight
        (b, t, h, _), size = q.shape, self.tile
        told = lax.bitcast_convert_type(q[0, -1, 0, 0].astype(jnp.float32), jnp.int32)
        key = jax.random.fold_in(jax.random.key(self.seed), told)
        return jax.random.uniform(key, (b, h, blocks_of(t, size), blocks_of(k.shape[1], size)))


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
        check_tile(self)

    def __call__(self, q, k, v, sight):
        """Spans of the diagonals and the columns that no span holds, merged by their log-sum-exps."""
        chosen = self.choose(q, k, sight)
        mixed, _ = attend_chosen(q, k, v, chosen, sight)
        extra = jnp.mean(chosen.count.astype(jnp.float32)) * q.shape[1]
        return mixed, _pairs(chosen.spans) + extra + self.looks(q.shape[1], k.shape[1])

    def looks(self, t: int, s: int) -> int:
        """Products of queries and keys that choosing costs a head."""
        return min(self.probe, t) * s

    def choose(self, q: Array, k: Array, sight: Sight, slash: Array | int | None = None) -> Chosen:
        """Spans and columns; ``slash``, a run-time value up to the attribute's, is how many diagonals are taken."""
        return self.spans(self.lines(q, k, sight, slash), q.shape[1], k.shape[1], sight)

    def lines(
        self, q: Array, k: Array, sight: Sight, slash: Array | int | None = None
    ) -> dict[str, Array]:
        """Places of ``columns`` and, descending, of diagonals (``offsets``), each with its ``count`` [b h]."""
        probes, place = _newest(q, sight, min(self.probe, q.shape[1]))
        weights, end = recent_attention(probes, k, place, _real(sight, k)), sight.ends()[:, None]
        vertical, most = max(self.vertical, self.sink), max(self.slash, self.local)
        columns, columns_count = best(vertical_scores(weights), vertical, vertical, self.sink, end)
        budget = most if slash is None else jnp.maximum(slash, self.local)
        offsets, offsets_count = best(slash_scores(weights, place), most, budget, self.local, end)
        return {
            "columns": jnp.minimum(columns, k.shape[1] - 1),
            "columns_count": columns_count,
            "offsets": _descending(offsets, offsets_count),
            "offsets_count": offsets_count,
        }

    def spans(self, lines: dict[str, Array], t: int, keys: int, sight: Sight) -> Chosen:
        """The plan of t queries and some keys that `lines` stand for, those of this input or of another."""
        spans = slash_spans(
            lines["offsets"], lines["offsets_count"], t, self.tile, keys=keys, start=sight.place[0]
        )
        return Chosen(spans, lines["columns"], lines["columns_count"])


@dataclasses.dataclass(frozen=True)
class PerHead:
    """Another pattern for each head (MInference's assignment).

    Attributes:
      patterns: what there is.
      heads: for each query head the index of its pattern.
    """

    patterns: tuple[Any, ...]
    heads: tuple[int, ...]
    heads_together = True

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


def _newest(q: Array, sight: Sight, count: int) -> tuple[Array, Array]:
    """The newest queries of each sequence [b w h p] and their places [#b w], -1 where it has not so many."""
    if sight.end is None:
        return q[:, -count:], sight.place[None, -count:]
    row = (sight.end - sight.place[0])[:, None] - count + jnp.arange(count, dtype=jnp.int32)
    return pick(q, jnp.maximum(row, 0)), jnp.where(row < 0, -1, sight.place[0] + row)


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
