"""A grid of tokens cut into regions, and attention of regions to chosen regions (BiFormer, arXiv 2303.08810, sec. 3.2).

Letters beside the legend's: ``r`` regions (``y`` as keys), ``w`` tokens of a region, ``k`` regions that a region reads.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import BlockLists
from dyncomp_kernels.sparse_attention.running import LOWEST


@dataclasses.dataclass(frozen=True)
class Regions:
    """``side`` x ``side`` regions of equal size over a grid of tokens in row-major order.

    Regions are in row-major order too, and so are the tokens of one. Where ``side`` does not divide the grid, the last
    regions of a row or column are filled up with tokens that are not `real`.

    Attributes:
      rows, columns: tokens of the grid.
      side: regions of a row and of a column.

    Raises:
      DyncompError: a region would be empty.
    """

    rows: int
    columns: int
    side: int

    def __post_init__(self):
        sizes = ((self.rows, self.height), (self.columns, self.width)) if self.side > 0 else ()
        if not sizes or any((self.side - 1) * each >= tokens for tokens, each in sizes):
            raise DyncompError(
                f"regions={self.side} a side leave some of a grid of {self.rows}x{self.columns} tokens empty; use fewer"
                " (at least 1), best a divisor"
            )

    @property
    def height(self) -> int:
        """Rows of a region."""
        return -(-self.rows // self.side)

    @property
    def width(self) -> int:
        """Columns of a region."""
        return -(-self.columns // self.side)

    @property
    def count(self) -> int:
        """Regions in all, r."""
        return self.side**2

    @property
    def size(self) -> int:
        """Tokens of a region, w."""
        return self.height * self.width

    def split(self, x: Array) -> Array:
        """[b t ...] to [b r w ...]; what fills up is 0."""
        b, rest = x.shape[0], x.shape[2:]
        x = x.reshape(b, self.rows, self.columns, *rest)
        fill = (self.side * self.height - self.rows, self.side * self.width - self.columns)
        if any(fill):
            x = jnp.pad(x, ((0, 0), (0, fill[0]), (0, fill[1]), *((0, 0) for _ in rest)))
        x = x.reshape(b, self.side, self.height, self.side, self.width, *rest)
        return x.swapaxes(2, 3).reshape(b, self.count, self.size, *rest)

    def join(self, x: Array) -> Array:
        """[b r w ...] to [b t ...]: the inverse of `split`."""
        b, rest = x.shape[0], x.shape[3:]
        x = x.reshape(b, self.side, self.side, self.height, self.width, *rest).swapaxes(2, 3)
        x = x.reshape(b, self.side * self.height, self.side * self.width, *rest)
        return x[:, : self.rows, : self.columns].reshape(b, self.rows * self.columns, *rest)

    def real(self, mask: Bool[Array, "b t"] | None, batch: int) -> Bool[Array, "b r w"]:
        """Which tokens of the regions there are, and are not padding."""
        there = jnp.ones((1, self.rows * self.columns), bool) if mask is None else mask
        split = self.split(there)
        return jnp.broadcast_to(split, (batch, *split.shape[1:]))

    def nearest(self, most: int) -> np.ndarray:
        """A region itself and those whose centres are nearest, int32 [r k]; of equally near ones the first."""
        place = np.stack(np.divmod(np.arange(self.count), self.side), axis=-1)
        steps = place[:, None] - place[None]
        far = np.square(steps * (self.height, self.width)).sum(axis=-1)
        return np.argsort(far, axis=-1, kind="stable")[:, :most].astype(np.int32)


def region_scores(
    q: Float[Array, "b r w h p"], k: Float[Array, "b y w h p"], real: Bool[Array, "b y w"]
) -> Float[Array, "b r y"]:
    """Products of the mean query and the mean key of regions, all heads together, float32 (paper, eq. 2 and 3).

    A region without real tokens has the lowest score as a key.
    """
    means = []
    for x in (q, k):
        wide = jnp.where(real[..., None, None], x.astype(jnp.float32), 0.0)
        some = jnp.maximum(jnp.sum(real, axis=-1), 1).astype(jnp.float32)
        means.append(jnp.sum(wide, axis=2) / some[..., None, None])
    scores = jnp.einsum("brhp,byhp->bry", *means, precision=lax.Precision.HIGHEST)
    return jnp.where(jnp.any(real, axis=-1)[:, None], scores, LOWEST)


def gathered_attention(
    q: Float[Array, "b r w h p"],
    k: Float[Array, "b y w h p"],
    v: Float[Array, "b y w h p"],
    index: Int[Array, "b r k"],
    real: Bool[Array, "b y w"],
    weights: Float[Array, "b r k"] | None = None,
) -> Float[Array, "b r w h p"]:
    """softmax(q k^T / sqrt(p)) v of every region over the tokens of its k regions (paper, eq. 5 and 6).

    Keys and values are copied k times, so memory and time are proportional to k. Softmax and sums are float32.

    Args:
      index: the regions that each region reads, no two alike.
      weights: factors on the gathered keys and values (the released code's soft routing).
    """
    b, r, w, h, p = q.shape
    take = jax.vmap(lambda x, chosen: x[chosen])
    k, v = take(k, index), take(v, index)  # [b r k w h p]
    if weights is not None:
        factor = weights.astype(k.dtype)[..., None, None, None]
        k, v = k * factor, v * factor
    k, v = (x.reshape(b, r, -1, h, p) for x in (k, v))
    seen = take(real, index).reshape(b, r, 1, 1, -1)
    scores = jnp.einsum("brwhp,brshp->brhws", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * jnp.float32(1.0 / math.sqrt(p)), LOWEST)
    mix = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("brhws,brshp->brwhp", mix, v, preferred_element_type=jnp.float32)
    return mixed.astype(q.dtype)


def listed_attention(
    q: Float[Array, "b r w h p"],
    k: Float[Array, "b y w h p"],
    v: Float[Array, "b y w h p"],
    index: Int[Array, "b r k"],
    real: Bool[Array, "b y w"],
) -> Float[Array, "b r w h p"]:
    """`gathered_attention` as block lists: regions are blocks of tokens, and no key is copied."""
    b, r, w, h, p = q.shape
    count = jnp.full((b, 1, r), index.shape[-1], jnp.int32)
    lists = BlockLists(index[:, None].astype(jnp.int32), count, w, w)
    flat = lambda x: x.reshape(b, -1, *x.shape[3:])  # the blocks of the lists are regions
    seen = flat(real)
    mixed, _ = sparse_attention(flat(q), flat(k), flat(v), lists, causal=False, real=seen)
    return mixed.reshape(b, r, w, h, p)
