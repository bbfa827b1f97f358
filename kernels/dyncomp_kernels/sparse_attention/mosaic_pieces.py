"""What the Hopper kernels share: sizes of tiles, how blocks of threads share the work, masks of partial tiles."""

import dataclasses
import inspect
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dyncomp_kernels.sparse_attention.layout import Layout
from dyncomp_kernels.sparse_attention.lists import blocks_of
from dyncomp_kernels.sparse_attention.scores import LOG2E, UNSEEN

HALF, HALVES, COPIER = 64, 2, 2
"""Rows of a warpgroup, warpgroups that multiply, index of the one that copies."""

KEYS = 128
"""Keys of a tile, at most."""

REGISTERS = 240, 24
"""Of the threads that multiply and of those that copy."""

START = 1 << 30
"""More than the place of any query."""

PART = "part"
"""Name of the axis of warpgroups."""

HIDDEN = 1 << 30
"""Place of a key that is padding."""

TILED = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
"""As the tensor cores read 16-bit tiles."""


def dealt(turn, mine, sms: int, items: int):
    """Which item block of threads ``mine`` of ``sms`` takes in its ``turn``, to and fro, and whether there is one."""
    rank = turn * sms + jnp.where(lax.rem(turn, 2) == 0, mine, sms - 1 - mine)
    return jnp.minimum(rank, items - 1), rank < items


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels divide a problem, over ``sms`` blocks of threads; all static.

    Attributes:
      parts: in how many parts, of equally many heads or rows, the queries are divided that read a tile of keys.
    """

    size: Layout
    sms: int
    parts: int = 1

    @property
    def scale(self) -> float:
        """Of scores in base 2."""
        return LOG2E / math.sqrt(self.size.p)

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return math.gcd(self.size.columns, KEYS)

    @property
    def split(self) -> int:
        """Tiles of a block of keys."""
        return self.size.columns // self.keys

    @property
    def halves(self) -> int:
        """Tiles of a warpgroup's queries in a block of queries, of all heads of a group."""
        return self.size.n // HALF

    @property
    def query_turns(self) -> int:
        """Turns that tiles of queries take."""
        return blocks_of(self.size.b * self.size.u * self.size.x * self.halves // HALVES, self.sms)

    @property
    def key_items(self) -> int:
        """Tiles of 128 keys times the parts of each."""
        size = self.size
        return size.b * size.g * size.y * size.columns // KEYS * self.parts

    def half(self, group, block, at):
        """Head of the ``at``-th tile of a warpgroup's queries in a block of queries, and which queries."""
        wide = self.size.rows // HALF
        begin = block * self.size.rows + lax.rem(at, wide) * HALF
        return group * self.size.r + lax.div(at, wide), pl.ds(pl.multiple_of(begin, HALF), HALF)

    def slab(self, first):
        """Slice of a tile of keys."""
        return pl.ds(pl.multiple_of(first, self.keys), self.keys)

    def dealt(self, turn, items: int):
        """`dealt` to this block of threads."""
        return dealt(turn, lax.axis_index("sm"), self.sms, items)

    def list_of(self, batch, group):
        """Where the lists of a group are."""
        return batch if self.size.w > 1 else 0, group if self.size.a > 1 else 0


@dataclasses.dataclass(frozen=True)
class QueryTile:
    """128 queries that a block of threads owns for a turn, and its steps: a tile of keys each.

    Attributes:
      live: whether there is a tile in this turn.
      steps: 0 where there is none.
    """

    plan: Plan
    index: Any
    batch: Any
    group: Any
    block: Any
    tile: Any
    live: Any
    steps: Any

    @classmethod
    def of(cls, plan: Plan, turn, order, index) -> "QueryTile":
        """By the table of `mosaic_gpu.by_length`."""
        size, tiles = plan.size, plan.halves // HALVES
        rank, live = plan.dealt(turn, size.b * size.u * size.x * tiles)
        place, length = ranked(order, lax.div(rank, tiles), size.m)
        tile = lax.rem(rank, tiles)
        row, block = lax.div(place, size.x), lax.rem(place, size.x)
        steps = jnp.where(live, length * plan.split, 0)
        return cls(
            plan, index, lax.div(row, size.u), lax.rem(row, size.u), block, tile, live, steps
        )

    @property
    def key_head(self):
        """Head of the keys."""
        return lax.div(self.group, self.plan.size.u // self.plan.size.g)

    def half(self, part):
        """Head of a warpgroup's queries, and which they are."""
        return self.plan.half(self.group, self.block, self.tile * HALVES + part)

    def first_key(self, j):
        """First key that step ``j`` reads; some key if there is no such step."""
        size, split = self.plan.size, self.plan.split
        row = *self.plan.list_of(self.batch, self.group), self.block
        entry = self.index[*row, jnp.minimum(lax.div(j, split), size.m - 1)]
        return entry * size.columns + lax.rem(j, split) * self.plan.keys


def start_of(order: Any) -> Any:
    """Place of the first query, out of the table of `mosaic_gpu.by_length`."""
    return order[0] + START


def ranked(order: Any, rank: Any, most: int) -> tuple[Any, Any]:
    """Flat index and length of the list of this rank, out of the table of `mosaic_gpu.by_length`."""
    code, blocks = order[rank + 1], order.shape[0] - 1
    less = lax.div(code, blocks)
    return code - less * blocks, most - less


def taken(ref: Any, axis: int) -> Array:
    """A vector out of memory, as the tensor cores lay out ``axis`` of a tile of a warpgroup."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    asked = index is not None and index.default is inspect.Parameter.empty  # by jax 0.10 only
    words = {"layout": plgpu.Layout.WGMMA.reduce(1 - axis), "optimized": False}
    return plgpu.load(ref, *([()] if asked else []), **words)


def by_rows(x: float | Array) -> Array:
    """A number for each row of a warpgroup, as the tensor cores lay rows out."""
    return plgpu.layout_cast(jnp.full((HALF,), x, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(columns: int) -> Array:
    """[64 columns], as the tensor cores lay them out."""
    return plgpu.layout_cast(jnp.zeros((HALF, columns), jnp.float32), plgpu.Layout.WGMMA)


def along(x: Array, like: Array, axis: int) -> Array:
    """A vector along an axis of ``like``, broadcast."""
    return lax.broadcast_in_dim(x, like.shape, [axis])


def masked(
    plan: Plan, scores: Array, batch: Any, place: Any, first: Any, marks: Any, axis: int = 1
) -> Array:
    """Scores with `UNSEEN` where a query does not see a key; costs nothing where all are seen.

    Args:
      place: of the first query; first: the first key.
      marks: where there is padding, the places of the keys int32 [b s'], `HIDDEN` for none, and which tiles of keys
        have some [b tiles]; else nothing.
      axis: of the keys.
    """
    size, rule, tests = plan.size, plan.size.seeing, []
    queries, keys = scores.shape[1 - axis], scores.shape[axis]
    if rule.causal:
        tests.append(first + (keys - 1) > place)
    if rule.window is not None:
        tests.append((first <= place + (queries - 1 - rule.window)) & (first + keys > rule.sink))
    if size.s % size.columns:
        tests.append(first + keys > size.s)
    if marks:
        tests.append(marks[1][batch, lax.div(first, plan.keys)] != 0)
    if not tests:
        return scores

    def mask(scores):
        row, key = (
            plgpu.broadcasted_iota(jnp.int32, scores.shape, i, layout=plgpu.Layout.WGMMA) + begin
            for i, begin in ((1 - axis, place), (axis, first))
        )
        limit = key
        if marks:
            limit = along(taken(marks[0].at[batch, pl.ds(first, keys)], axis), scores, axis)
        seen = limit <= row if rule.causal else limit < HIDDEN
        if rule.window is not None:
            seen = seen & ((key > row - rule.window) | (key < rule.sink))
        if size.s % size.columns:
            seen = seen & (key < size.s)
        return jnp.where(seen, scores, jnp.full_like(scores, UNSEEN))

    partial = tests[0]
    for test in tests[1:]:
        partial = partial | test
    return lax.cond(partial, mask, lambda scores: scores, scores)
