"""What trees would accept on greedy text that is already written: host-side, exact, any number of trees from one pass.

A guess depends on the tokens before it and not on the tree that carries its prompt tokens, and greedy acceptance asks
only whether a candidate is the token that the model writes anyway. So the ranks of the written tokens among the guesses
made at each position (`guess_ranks`) decide every pass of `TreeGenerator`, for every family of trees. Letters: ``n``
positions, ``k`` prompt tokens, ``r`` ranks.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.tree_states import TreeFamily


def guess_ranks(guesses: Float[Array, "*n k v"], right: Int[Array, "*n k"]) -> Int[Array, "*n k"]:
    """int32, how many tokens a guess puts before the right one: 0 is its best; of equals the lower id comes first."""
    own = jnp.take_along_axis(guesses, right[..., None], axis=-1)
    ids = jnp.expand_dims(jnp.arange(guesses.shape[-1]), tuple(range(guesses.ndim - 1)))
    before = (guesses > own) | ((guesses == own) & (ids < right[..., None]))
    return jnp.sum(before, axis=-1, dtype=jnp.int32)


def rank_accuracy(ranks: Int[np.ndarray, "n k"], best: int = 10) -> Float[np.ndarray, "k r"]:
    """acc[i, r], for `tree.candidate_tree`: share of positions whose token has rank r, r < ``best``, at prompt i.

    Use texts that acceptance is not reported on.
    """
    return (ranks[:, :, None] == np.arange(best)).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class Replay:
    """The passes over one text.

    Attributes:
      accepted: int [p], candidates that each pass accepts; it writes one token more.
      depths: int [p], of the tree of each pass: its state.
    """

    accepted: Int[np.ndarray, "p"]
    depths: Int[np.ndarray, "p"]

    def slots(self, family: TreeFamily) -> int:
        """Tokens computed in all passes: roots, candidates and prompt tokens."""
        return int(family.widths()[self.depths - 1].sum())


def replay(family: TreeFamily, ranks: Int[np.ndarray, "n k"]) -> Replay:
    """Passes from the first position to the last, the first with the deepest tree.

    Args:
      family: trees of at most k depths.
      ranks: of position n in the text, where the tokens 2 .. k + 1 places later stand among the guesses made there.
    """
    k = len(family.trees)
    prompts = [
        dict(zip(tree.paths, own.tolist(), strict=True))
        for tree, own in zip(family.trees, family.prompts, strict=True)
    ]
    rows, at, state = ranks.tolist(), 0, k
    accepted, depths = [], []
    while at < len(rows):
        tree, path = prompts[state - 1], ()
        while len(path) < k and (longer := (*path, rows[at][len(path)])) in tree:
            path = longer
        accepted.append(len(path))
        depths.append(state)
        at += len(path) + 1
        state = tree[path] if path else k
    return Replay(np.asarray(accepted, np.int64), np.asarray(depths, np.int64))
