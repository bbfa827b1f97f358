"""The portable form: one loop over blocks of queries, and in it one over the blocks of keys that are listed.

Letters beside those of the lists: ``c`` key/value heads that share a list, ``r`` query heads of each, ``n`` = r x rows.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of
from dyncomp_kernels.sparse_attention.running import LOWEST, Running


@dataclasses.dataclass(frozen=True)
class Seeing:
    """Which pairs of listed blocks count; see `api.sparse_attention`."""

    causal: bool = True
    window: int | None = None
    sink: int = 0


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    b: int
    t: int
    s: int
    h: int
    g: int
    p: int
    a: int
    rows: int
    columns: int
    unit: int
    seeing: "Seeing"

    @classmethod
    def of(cls, q: Array, k: Array, lists: BlockLists, seeing: "Seeing") -> "Shape":
        """From the arguments; blocks are no longer than the sequences."""
        (b, t, h, p), (_, s, g, _) = q.shape, k.shape
        a, unit = lists.index.shape[1], lists.columns if lists.unit is None else lists.unit
        return cls(b, t, s, h, g, p, a, lists.rows, min(lists.columns, s), unit, seeing)

    @property
    def c(self) -> int:
        """Key/value heads of a list."""
        return max(self.g // self.a, 1)

    @property
    def r(self) -> int:
        """Query heads of a key/value head of a list."""
        return self.h // (self.a * self.c)

    @property
    def x(self) -> int:
        """Blocks of queries."""
        return blocks_of(self.t, self.rows)


class Task(NamedTuple):
    """One block of queries of one list.

    Attributes:
      batch, head: int32 [], sequence and first key/value head.
      start: int32 [], first query.
      index, count: its list.
    """

    batch: Array
    head: Array
    start: Array
    index: Array
    count: Array


def tasks_of(lists: BlockLists, size: Shape) -> Task:
    """All of them, stacked [b a x] flattened."""
    shape = (size.b, size.a, size.x)
    grid = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in shape), indexing="ij")
    batch, group, block = (part.reshape(-1) for part in grid)
    wide = lambda x: jnp.broadcast_to(x, (*shape, *x.shape[3:])).reshape(-1, *x.shape[3:])
    return Task(
        batch, group * size.g // size.a, block * size.rows, wide(lists.index), wide(lists.count)
    )


def grouped(x: Array, size: Shape) -> Array:
    """Query-like [b t h p] as blocks [b a x c n p] flattened to tasks [.. c n p]; padded at the end."""
    x = jnp.pad(x, ((0, 0), (0, size.x * size.rows - size.t), (0, 0), (0, 0)))
    x = x.reshape(size.b, size.x, size.rows, size.a, size.c, size.r, x.shape[-1])
    return x.transpose(0, 3, 1, 4, 5, 2, 6).reshape(-1, size.c, size.r * size.rows, x.shape[-1])


def ungrouped(x: Array, size: Shape) -> Array:
    """The inverse of `grouped`."""
    x = x.reshape(size.b, size.a, size.x, size.c, size.r, size.rows, x.shape[-1])
    x = x.transpose(0, 2, 5, 1, 3, 4, 6).reshape(size.b, size.x * size.rows, size.h, x.shape[-1])
    return x[:, : size.t]


def key_block(x: Array, task: Task, start: Array, size: Shape) -> Array:
    """Keys or values [b g s p] of one block of a task: float32 [c columns p]."""
    zero = jnp.int32(0)
    cut = (1, size.c, size.columns, x.shape[-1])
    return lax.dynamic_slice(x, (task.batch, task.head, start, zero), cut)[0].astype(jnp.float32)


def seen(
    task: Task, at: Array, real: Array | None, offset: Array, size: Shape
) -> tuple[Array, Array]:
    """First key of listed block ``at``, and which of its keys the queries see: bool [rows columns].

    What is read lies within the keys: of a block that reaches beyond them, some of it belongs to its neighbour.
    """
    begin = task.index[at] * size.unit
    start = jnp.clip(begin, 0, size.s - size.columns)
    key = start + jnp.arange(size.columns, dtype=jnp.int32)
    fits = (key >= begin) & (key < begin + size.columns)
    if real is not None:
        fits = fits & lax.dynamic_slice(real, (task.batch, start), (1, size.columns))[0]
    rule, visible = size.seeing, jnp.broadcast_to(fits[None], (size.rows, size.columns))
    place = (offset + task.start + jnp.arange(size.rows, dtype=jnp.int32))[:, None]
    if rule.causal:
        visible = visible & (key[None] <= place)
    if rule.window is not None:
        visible = visible & ((key[None] > place - rule.window) | (key[None] < rule.sink))
    return start, visible


def masked(scores: Array, visible: Array, size: Shape) -> Array:
    """Scores [c n columns] with what is not seen at the lowest value."""
    split = scores.reshape(size.c, size.r, size.rows, size.columns)
    return jnp.where(visible, split, LOWEST).reshape(scores.shape)


def forward(
    q: Array,
    k: Array,
    v: Array,
    lists: BlockLists,
    offset: Array,
    real: Array | None,
    seeing: Seeing,
) -> tuple[Array, Array]:
    """Output [b t h p] in the dtype of q, and log-sum-exp float32 [b t h]; sums are float32."""
    size = Shape.of(q, k, lists, seeing)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scaled = grouped(q.astype(jnp.float32) / math.sqrt(size.p), size)
    given_to = q, k, v, *jax.tree.leaves((lists, offset, real))

    def run(given: tuple[Array, Task]) -> tuple[Array, Array]:
        own, task = given

        def fold(at: Array, state: Running) -> Running:
            start, visible = seen(task, at, real, offset, size)
            keys, values = (key_block(x, task, start, size) for x in (k, v))
            scores = masked(jnp.einsum("cnp,csp->cns", own, keys), visible, size)
            mix = lambda weights: jnp.einsum("cns,csp->cnp", weights, values)
            return state.add(scores, mix, seen=scores != LOWEST)

        blank = _vary(Running.blank(own.shape), *given_to)
        top, total, mixed = lax.fori_loop(0, task.count, fold, blank)
        blind = total == 0
        some = jnp.where(blind, 1.0, total)
        return mixed / some[..., None], jnp.where(blind, -jnp.inf, top + jnp.log(some))

    mixed, lse = lax.map(run, (scaled, tasks_of(lists, size)))
    return ungrouped(mixed, size).astype(q.dtype), ungrouped(lse[..., None], size)[..., 0]


def backward(
    saved: tuple[Array, ...], lists: BlockLists, offset: Array, real: Array | None,
    d_out: Array, d_lse: Array, seeing: Seeing,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q, k and v (Dao et al. 2022, algorithm 4), in one pass over the listed blocks."""
    q, k, v, out, lse = saved
    size = Shape.of(q, k, lists, seeing)
    scale = 1 / math.sqrt(size.p)
    keys_first, values_first = k.swapaxes(1, 2), v.swapaxes(1, 2)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    wide = lambda x: grouped(x.astype(jnp.float32), size)
    parts = (
        wide(q) * scale,
        wide(d_out),
        wide(lse[..., None])[..., 0],
        wide(delta[..., None])[..., 0],
    )
    given_to = *saved, d_out, d_lse, *jax.tree.leaves((lists, offset, real))
    blank = _vary(jnp.zeros(keys_first.shape, jnp.float32), *given_to)

    def run(state: tuple[Array, Array], given: Any) -> Any:
        (own, d_own, own_lse, own_delta), task = given

        def fold(at: Array, state: Any) -> Any:
            d_q, d_k, d_v = state
            start, visible = seen(task, at, real, offset, size)
            keys, values = (key_block(x, task, start, size) for x in (keys_first, values_first))
            scores = masked(jnp.einsum("cnp,csp->cns", own, keys), visible, size)
            weights = jnp.where(scores != LOWEST, jnp.exp(scores - own_lse[..., None]), 0.0)
            slope = jnp.einsum("cnp,csp->cns", d_own, values) - own_delta[..., None]
            slope = weights * slope
            place = (task.batch, task.head, start, jnp.int32(0))
            d_v = _added(d_v, jnp.einsum("cns,cnp->csp", weights, d_own), place)
            d_k = _added(d_k, jnp.einsum("cns,cnp->csp", slope, own), place)
            return d_q + jnp.einsum("cns,csp->cnp", slope, keys), d_k, d_v

        blank = _vary(jnp.zeros_like(own), *given_to)
        d_q, d_k, d_v = lax.fori_loop(0, task.count, fold, (blank, *state))
        return (d_k, d_v), d_q * scale

    (d_k, d_v), d_q = lax.scan(run, (blank, blank), (parts, tasks_of(lists, size)))
    as_given = lambda d, x: d.swapaxes(1, 2).astype(x.dtype)
    return ungrouped(d_q, size).astype(q.dtype), as_given(d_k, k), as_given(d_v, v)


def _vary(tree: Any, *others: Array) -> Any:
    """What a loop begins with: inside a `shard_map` it varies over the axes that its arguments vary over."""
    return jax.tree.map(lambda x: vary_like(x, *others), tree)


def _added(whole: Array, part: Array, place: tuple[Array, ...]) -> Array:
    """``whole`` with ``part`` [c columns p] added at ``place``."""
    part = part[None]
    own = lax.dynamic_slice(whole, place, part.shape)
    return lax.dynamic_update_slice(whole, own + part, place)
