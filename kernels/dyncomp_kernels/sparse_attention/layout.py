"""How the Pallas forms lay a problem out: query heads that share keys and a list lie in one block.

Letters: ``u`` groups of query heads, ``r`` heads of a group, ``n`` = r x rows queries of a block, ``w`` list batch.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of
from dyncomp_kernels.sparse_attention.xla import Seeing


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a problem, all static."""

    b: int
    t: int
    s: int
    h: int
    g: int
    p: int
    w: int
    a: int
    m: int
    rows: int
    columns: int
    seeing: Seeing

    @classmethod
    def of(cls, q: Any, k: Any, lists: BlockLists, seeing: Seeing) -> "Layout":
        """From the arguments of `api.sparse_attention`, or their shapes."""
        (b, t, h, p), (_, s, g, _), (w, a, _, m) = q.shape, k.shape, lists.index.shape
        return cls(b, t, s, h, g, p, w, a, m, lists.rows, lists.columns, seeing)

    @property
    def u(self) -> int:
        """Groups of query heads; heads of one group share a list and a key/value head."""
        return max(self.a, self.g)

    @property
    def r(self) -> int:
        """Query heads of a group."""
        return self.h // self.u

    @property
    def x(self) -> int:
        """Blocks of queries."""
        return blocks_of(self.t, self.rows)

    @property
    def y(self) -> int:
        """Blocks of keys."""
        return blocks_of(self.s, self.columns)

    @property
    def n(self) -> int:
        """Rows of a block of queries of all heads of a group, head by head."""
        return self.r * self.rows

    def queries(self, x: Array) -> Array:
        """Query-like [b t h p] as [b u x n p]; padded at the end."""
        x = jnp.pad(x, ((0, 0), (0, self.x * self.rows - self.t), (0, 0), (0, 0)))
        x = x.reshape(self.b, self.x, self.rows, self.u, self.r, x.shape[-1])
        return x.transpose(0, 3, 1, 4, 2, 5).reshape(self.b, self.u, self.x, self.n, x.shape[-1])

    def of_queries(self, x: Array) -> Array:
        """The inverse of `queries`."""
        x = x.reshape(self.b, self.u, self.x, self.r, self.rows, x.shape[-1])
        x = x.transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(self.b, self.x * self.rows, self.h, x.shape[-1])[:, : self.t]

    def rows_of(self, x: Array) -> Array:
        """One number a query, [b t h], as [b u x 1 n]."""
        return jnp.swapaxes(self.queries(x[..., None]), -1, -2)

    def keys(self, x: Array) -> Array:
        """Keys or values [b s g p] as [b g s' p]; s' is whole blocks."""
        x = jnp.pad(x, ((0, 0), (0, self.y * self.columns - self.s), (0, 0), (0, 0)))
        return x.swapaxes(1, 2)

    def of_keys(self, x: Array) -> Array:
        """The inverse of `keys`."""
        return x[:, :, : self.s].swapaxes(1, 2)


def rows_of_lists(lists: BlockLists) -> Array:
    """Count and entries of each list in one row, int32 [w a x 1 1+m]."""
    rows = jnp.concatenate([lists.count[..., None], lists.index], axis=-1)
    return rows.astype(jnp.int32)[..., None, :]
