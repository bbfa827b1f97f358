"""Prefill attention among the important tokens of a prompt (ZipVL, arXiv 2410.08584, algorithm 1)."""

import dataclasses

import jax
import jax.numpy as jnp

from dyncomp.attention.asked import pick
from dyncomp.attention.importance import Importance, Split
from dyncomp.attention.sight import Sight
from dyncomp.core.aux import Count
from dyncomp.core.typing import Array, Float, Int
from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of, lists_of


def important_attention(
    q: Float[Array, "b t h p"],
    k: Float[Array, "b s g p"],
    v: Float[Array, "b s g p"],
    split: Split,
    start: Int[Array, ""] | int = 0,
    most: int | None = None,
    tile: int = 64,
) -> tuple[Float[Array, "b t h p"], Int[Array, ""]]:
    """Causal attention of the important queries over the important keys; every other query gets zeros.

    Queries, keys and values of T lie together in the order of their places, so causality is that of their ranks. Work
    follows the square of p, in blocks.

    Args:
      start: slot of the first query (a run-time value).
      most: cap of p (static); default s.
      tile: queries and keys of a block.

    Returns:
      Mixed values, and the pairs computed of a sequence, a mean over the batch rounded up, int32 [].
    """
    b, t = q.shape[:2]
    most = k.shape[1] if most is None else min(most, k.shape[1])
    seen = jnp.arange(most, dtype=jnp.int32)[None] < split.count[:, None]
    index = jnp.where(seen, split.order[:, :most], split.order[:, :1])
    row = index - jnp.asarray(start, jnp.int32)
    own = pick(q, jnp.clip(row, 0, t - 1))
    lists = _lists(split.count, most, tile)
    mixed, _ = sparse_attention(own, pick(k, index), pick(v, index), lists, real=seen)
    to = jnp.where(seen & (row >= 0), row, t)
    spread = jax.vmap(
        lambda to, x: jnp.zeros((t, *x.shape[1:]), x.dtype).at[to].set(x, mode="drop")
    )
    return spread(to, mixed), -(-lists.listed * (tile * tile) // b)


def _lists(count: Int[Array, "b"], most: int, tile: int) -> BlockLists:
    """Causal blocks that hold one of the first ``count`` queries and keys of a row."""
    first = tile * jnp.arange(blocks_of(most, tile), dtype=jnp.int32)
    there = first[None] < count[:, None]
    causal = first[None] <= first[:, None]
    return lists_of((there[:, :, None] & there[:, None] & causal)[:, None], tile, tile)


@dataclasses.dataclass(frozen=True)
class ImportantTokens(Importance):
    """A pattern: attention among important tokens only, queries and keys; the other queries read nothing.

    All tokens still pass through projections and networks, and each layer chooses afresh. For prefill: the choice
    depends on later queries. What a probing query scores counts as half a pair. `MixedPrecision` makes the same choice
    once for prefill and cache.

    Attributes:
      tile: queries and keys of a block.
    """

    tile: int = 64
    heads_together = True

    def __call__(
        self, q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight
    ) -> tuple[Float[Array, "b t h p"], Count]:
        """Mixed values, and pairs, needed and executed, float32 []."""
        shape = k.shape[:2]
        real = (sight.key_place >= 0) & (sight.key_place <= sight.place[-1])
        split = self.choose(q, k, sight.place, jnp.broadcast_to(real, shape))
        most = self.cap(shape[1])
        mixed, pairs = important_attention(q, k, v, split, sight.place[0], most, self.tile)
        probed = split.probes * shape[1] / 2
        needed = jnp.mean((split.count * (split.count + 1) // 2).astype(jnp.float32))
        return mixed, Count(needed + probed, pairs.astype(jnp.float32) + probed)
