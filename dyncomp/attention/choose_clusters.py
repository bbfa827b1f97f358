"""Which clusters a query reads: the best by score, and the first and the last of the text."""

import jax.numpy as jnp
from jax import lax

from dyncomp.core.typing import Array, Bool, Float, Int

NONE = jnp.iinfo(jnp.int32).max


def chosen_clusters(
    scores: Float[Array, "b g c"],
    clusters: Int[Array, "b g c"],
    there: Bool[Array, "b g c"],
    last: Int[Array, "b"],
    take: Int[Array, "b"],
    most: int,
    limit: Int[Array, ""] | None = None,
) -> tuple[Int[Array, "b g m"], Bool[Array, "b g m"]]:
    """The ``take`` best candidates of each row and key/value head, and the forced ones where they are not among them.

    Args:
      clusters: distinct numbers of the candidates; 0 and ``last`` are forced.
      there: which candidates exist.
      last: -1 to force only the first.
      take: a run-time value.
      most: m, entries of the list (static).
      limit: of the list's entries at most so many count, forced ones first (a run-time value).

    Returns:
      numbers, ascending, and which entries count; those that do not hold a number in range.
    """
    forced = there & ((clusters == 0) | (clusters == last[:, None, None]))
    plain = jnp.where(there, scores.astype(jnp.float32), -jnp.inf)
    most = min(most, scores.shape[-1])
    _, order = lax.top_k(jnp.where(forced, jnp.inf, plain), most)
    at = lambda x: jnp.take_along_axis(x, order, axis=-1)
    number, own, given, exists = at(clusters), at(plain), at(forced), at(there)
    place = jnp.arange(most, dtype=jnp.int32)
    # The rank by score alone: its place behind the forced ones, and those of them that score better.
    first = jnp.max(jnp.where(given & (number == 0), own, -jnp.inf), axis=-1, keepdims=True)
    end = jnp.max(jnp.where(given & (number > 0), own, -jnp.inf), axis=-1, keepdims=True)
    better = (first >= own).astype(jnp.int32) + (end > own).astype(jnp.int32)
    rank = place - jnp.sum(given, axis=-1, keepdims=True, dtype=jnp.int32) + better
    chosen = exists & (given | (rank < take[:, None, None]))
    chosen = chosen if limit is None else chosen & (place < limit)
    index = jnp.sort(jnp.where(chosen, number, NONE), axis=-1)
    seen = index < NONE
    return jnp.where(seen, index, 0), seen
