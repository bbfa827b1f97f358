"""Which path of a tree is accepted: pure functions of a verification pass, for one tree or one a row.

First each slot is asked whether it fits its parent's prediction (`greedy_matches`, `typical_matches`), then the longest
path of fitting slots is taken (`longest_path`). Tables are those of `dyncomp.decoding.tree_tables`: shared by all rows
or, gathered by each row's state, with a leading batch axis. Letters: ``n`` slots, ``c`` paths, ``p`` places of a path.
"""

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.typing import Array, Bool, Float, Int


@struct.dataclass
class TreeAcceptance:
    """What a pass accepts.

    Attributes:
      accepted: int32 [b], candidates accepted, 0 .. depth of the tree; the text grows by one more.
      slots: int32 [b p], the accepted path from the root (slot 0, always accepted), then -1.
      last: int32 [b], slot of the last accepted node; 0 where no candidate is. Its prompts are the next state, its
        logits give the token that follows.
    """

    accepted: Int[Array, "b"]
    slots: Int[Array, "b p"]
    last: Int[Array, "b"]


def greedy_matches(
    tokens: Int[Array, "b n"],
    greedy: Int[Array, "b n"],
    parent: Int[Array, "n"] | Int[Array, "b n"],
) -> Bool[Array, "b n"]:
    """Whether each slot holds the argmax at its parent: then the text is the model's greedy one.

    Args:
      tokens: int32, what fills each slot.
      greedy: int32, argmax of the model at each slot.
      parent: see `TreeTables`; a slot without one never matches.
    """
    parent = jnp.broadcast_to(parent, tokens.shape)
    wanted = jnp.take_along_axis(greedy, jnp.maximum(parent, 0), axis=1)
    return (tokens == wanted) & (parent >= 0)


def typical_matches(
    tokens: Int[Array, "b n"],
    logits: Float[Array, "b n v"],
    parent: Int[Array, "n"] | Int[Array, "b n"],
    *,
    temperature: float = 1.0,
    epsilon: float = 0.09,
    alpha: float = 0.3,
) -> Bool[Array, "b n"]:
    """Typical acceptance: p(token | parent) > min(epsilon, alpha exp(-H)), H in nats (Medusa, arXiv 2401.10774).

    p and H are of the parent's softmax at ``temperature``. It changes the distribution of the text. Defaults as in
    arXiv 2405.18628 (some default arguments of its code swap the two).
    """
    parent = jnp.broadcast_to(parent, tokens.shape)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    possible = log_p > -jnp.inf
    entropy = -jnp.sum(jnp.where(possible, jnp.exp(log_p) * log_p, 0.0), axis=-1)
    limit = jnp.minimum(epsilon, alpha * jnp.exp(-entropy))
    above = jnp.maximum(parent, 0)
    rows = jnp.arange(tokens.shape[0])[:, None]
    p = jnp.exp(log_p[rows, above, jnp.maximum(tokens, 0)])
    return (p > limit[rows, above]) & (parent >= 0) & (tokens >= 0)


def longest_path(
    matches: Bool[Array, "b n"], paths: Int[Array, "c p"] | Int[Array, "b c p"]
) -> TreeAcceptance:
    """The path with most matching slots from the root on; the first of equals. Padding (-1) is never accepted."""
    batch = matches.shape[0]
    paths = jnp.broadcast_to(paths, (batch, *paths.shape[-2:]))
    rows = jnp.arange(batch)
    fits = matches[rows[:, None, None], jnp.maximum(paths[:, :, 1:], 0)] & (paths[:, :, 1:] >= 0)
    lengths = jnp.sum(jnp.cumprod(fits.astype(jnp.int32), axis=-1), axis=-1, dtype=jnp.int32)
    best = jnp.argmax(lengths, axis=-1)
    accepted = lengths[rows, best]
    path = paths[rows, best]
    slots = jnp.where(jnp.arange(path.shape[1])[None] <= accepted[:, None], path, -1)
    return TreeAcceptance(accepted, slots.astype(jnp.int32), path[rows, accepted].astype(jnp.int32))
