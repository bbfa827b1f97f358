"""How many drafted tokens to keep, and how many to draft next.

A draft of up to ``k`` tokens a row is verified in one pass of the target, which gives its opinion at k + 1 places:
place i is what follows the text and the first i drafts. Rows may draft fewer than k; the rest of a row is ignored.
"""

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int, Key
from dyncomp.decoding.sampling import row_keys


@struct.dataclass
class Acceptance:
    """What a verification pass adds to each row.

    Attributes:
      accepted: int32 [b], drafted tokens that are kept, 0 .. the row's draft length.
      tokens: int32 [b k+1], the kept drafts, then the target's own token; -1 beyond. ``accepted + 1`` tokens a row.
    """

    accepted: Int[Array, "b"]
    tokens: Int[Array, "b k1"]


def accept_greedy(
    drafts: Int[Array, "b k"], lengths: Int[Array, "b"], greedy: Int[Array, "b k1"]
) -> Acceptance:
    """The longest prefix that the target would have written itself, and its next token.

    The output is the target's greedy text, whatever the drafts are.

    Args:
      drafts: int32, ``lengths[i]`` of row i are real.
      lengths: int32, 0..k.
      greedy: int32 [b k+1], the target's argmax at each place.
    """
    _check_places(drafts, greedy)
    accepted = _prefix(drafts == greedy[:, :-1], lengths)
    own = jnp.take_along_axis(greedy, accepted[:, None], axis=1)[:, 0]
    return _emit(drafts, accepted, own)


def accept_sampled(
    key: Key[Array, ""] | Key[Array, "b"],
    drafts: Int[Array, "b k"],
    lengths: Int[Array, "b"],
    proposed: Float[Array, "b k v"],
    target: Float[Array, "b k1 v"],
) -> Acceptance:
    """Speculative sampling: the text has the target's distribution (arXiv 2211.17192, alg. 1; 2302.01318, alg. 2).

    Draft i is kept with probability min(1, p/q) if all before it were; the first that is not is replaced by a sample
    of `residual`; if none failed, the target's distribution after them gives one token more.

    Args:
      key: one for each row, or one of which row i uses ``fold_in(key, i)``.
      drafts: int32, drawn from ``proposed``; ``lengths[i]`` of row i are real.
      lengths: int32, 0..k.
      proposed: float32, the draft model's probabilities q at each drafted place, as they were sampled from.
      target: float32 [b k+1 v], the target's probabilities p, after the same temperature and filters as its samples.
    """
    _check_places(drafts, target)
    draws = jax.vmap(jax.random.split)(row_keys(key, drafts.shape[0]))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, drafts.shape[1:]))(draws[:, 0])
    p, q = (_at(values, drafts) for values in (target[:, :-1], proposed))
    # u < p / q without the division: q > 0 for what was drafted, and u < 1 keeps p >= q always.
    accepted = _prefix(uniform * q < p, lengths)
    place = accepted[:, None, None]
    p_next = jnp.take_along_axis(target, place, axis=1)[:, 0]
    padded = jnp.pad(proposed, ((0, 0), (0, 1), (0, 0)))
    q_next = jnp.take_along_axis(padded, place, axis=1)[:, 0]
    q_next = jnp.where((accepted < lengths)[:, None], q_next, 0.0)  # nothing was refused: plain p
    own = jax.vmap(jax.random.categorical)(draws[:, 1], jnp.log(residual(p_next, q_next)))
    return _emit(drafts, accepted, own.astype(jnp.int32))


def residual(p: Float[Array, "*n v"], q: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """max(p - q, 0), normalised: what a refused draft is replaced from; p where nothing is left."""
    left = jnp.maximum(p - q, 0.0)
    total = jnp.sum(left, axis=-1, keepdims=True)
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1.0), p)


def next_window(
    window: Int[Array, "b"], accepted: Int[Array, "b"], drafted: Int[Array, "b"], *, limit: int
) -> Int[Array, "b"]:
    """How many tokens to draft next: 2 more if all were kept, else 1 fewer, within 1..limit.

    The heuristic of Hugging Face's assisted generation (which has no upper limit). Where nothing was drafted, nothing
    is learned and the window stays.

    Raises:
      DyncompError: ``limit`` below 1.
    """
    if limit < 1:
        raise DyncompError(f"next_window: limit={limit}; draft at least 1 token")
    moved = jnp.where(accepted == drafted, window + 2, window - 1)
    return jnp.clip(jnp.where(drafted > 0, moved, window), 1, limit)


def _prefix(kept: Bool[Array, "b k"], lengths: Int[Array, "b"]) -> Int[Array, "b"]:
    """How many of the first ``lengths`` are kept before one is not."""
    real = jnp.arange(kept.shape[1])[None, :] < lengths[:, None]
    return jnp.sum(jnp.cumprod((kept & real).astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _at(values: Float[Array, "b k v"], tokens: Int[Array, "b k"]) -> Float[Array, "b k"]:
    """Values of the tokens."""
    return jnp.take_along_axis(values, tokens[:, :, None], axis=-1)[:, :, 0]


def _emit(drafts: Int[Array, "b k"], accepted: Int[Array, "b"], own: Int[Array, "b"]) -> Acceptance:
    """The kept drafts, then the target's own token."""
    place = jnp.arange(drafts.shape[1] + 1)[None, :]
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    end = accepted[:, None]
    tokens = jnp.where(place < end, padded, jnp.where(place == end, own[:, None], -1))
    return Acceptance(accepted, tokens.astype(jnp.int32))


def _check_places(drafts: Array, opinions: Array) -> None:
    if opinions.shape[1] != drafts.shape[1] + 1:
        raise DyncompError(
            f"{drafts.shape[1]} drafted tokens need {drafts.shape[1] + 1} places of the target, got {opinions.shape[1]}"
        )
