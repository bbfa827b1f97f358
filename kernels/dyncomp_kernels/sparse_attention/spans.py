"""Diagonals as spans of keys: for every block of queries tiles that cover some offsets and do not overlap."""

import jax.numpy as jnp
from jax import Array, lax

from dyncomp_kernels._compat import vary_like
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of


def slash_spans(
    offsets: Array, count: Array, t: int, size: int, *, keys: int, start: Array | int = 0
) -> BlockLists:
    """Tiles of ``size`` queries by ``size`` keys that hold every causal pair at the given offsets (and some more).

    The rule of MInference's index builder (arXiv 2407.02490, released code): through the offsets from the farthest on,
    the ``size`` keys that a diagonal touches open a new tile where they begin beyond the newest one, and where they
    only overlap its end, one more tile is put behind it. A tile may reach past the last query: attention stays causal.

    Args:
      offsets: int32 [b h m], distances i - j >= 0 of query and key, descending, no two alike in the first ``count``.
      count: int32 [b h].
      t: queries, at places ``start`` (a run-time value), ``start`` + 1, ...
      keys: at places 0, 1, ...; the last query's is among them.

    Returns:
      lists with ``unit`` 1, [b h x m'], m' at most ceil(keys / size) + 1.
    """
    blocks = blocks_of(t, size)
    ends = jnp.asarray(start, jnp.int32) + (jnp.arange(blocks, dtype=jnp.int32) + 1) * size
    used = jnp.arange(offsets.shape[-1], dtype=jnp.int32) < count[..., None]

    def step(newest: Array, given: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        offset, used = (x[..., None] for x in given)  # [b h 1]
        end = (
            ends - offset
        )  # behind the last key that this diagonal touches in each block of queries
        touches = used & (end > 0)
        end = jnp.maximum(end, size)
        opens, grows = end > newest + size, end > newest
        begin = jnp.where(opens, end - size, newest)
        emitted = touches & grows
        return jnp.where(emitted, begin + size, newest), (begin, emitted)

    none = jnp.full((*offsets.shape[:2], blocks), -size, jnp.int32)
    none = vary_like(none, offsets, count, ends)
    along = (jnp.moveaxis(offsets, -1, 0), jnp.moveaxis(used, -1, 0))
    _, (begins, emitted) = lax.scan(step, none, along)  # [m b h x]
    most = blocks_of(keys, size) + 1
    place = jnp.where(emitted, jnp.cumsum(emitted, axis=0, dtype=jnp.int32) - 1, most)
    index = jnp.zeros((most + 1, *begins.shape[1:]), jnp.int32)
    index = jnp.put_along_axis(index, place, begins, axis=0, inplace=False)[:most]
    total = jnp.sum(emitted, axis=0, dtype=jnp.int32)
    return BlockLists(jnp.moveaxis(index, 0, -1), total, size, size, unit=1)
