"""A tree as the static tables of one decoding pass: slots, positions, mask, paths (arXiv 2405.18628).

Slots come in this order: the root, the candidates, then the prompt tokens of each (the root's first). Several trees
become one program by padding them to common shapes (`stack_tables`) and picking the state's tables at run time.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from dyncomp.core.typing import Array, Bool, Int
from dyncomp.decoding.tree import CandidateTree, Path


@struct.dataclass
class TreeTables:
    """What a pass over one tree needs; all entries static numpy. Stacked, every leaf has a leading axis of states.

    Letters: ``n`` slots, ``m1`` nodes (the root and the candidates), ``k`` prompt tokens, ``c`` paths, ``p`` places
    of a path.

    Attributes:
      real: bool [n], False in padding.
      parent: int32 [n], slot before this one on the way from the root; -1 for the root and padding.
      depth: int32 [n], distance from the root: position = position of the root + depth.
      mask: bool [n n], which slots a slot sees (rows see columns): itself and its ancestors. The cache comes on top.
      guess_depth: int32 [n], which prompt's guesses fill a candidate's slot, 0..k-1; -1 elsewhere.
      guess_rank: int32 [n], the rank of the guess; -1 elsewhere.
      prompt: int32 [n], which prompt token fills a slot, 0..k-1; -1 elsewhere.
      paths: int32 [c p], slots from the root to each leaf, then -1.
      prompts: int32 [m1], prompt tokens of each node: the next state, if it is the last one accepted.
      prompt_slots: int32 [m1 k], where they are, then -1.
    """

    real: Bool[np.ndarray | Array, "*s n"]
    parent: Int[np.ndarray | Array, "*s n"]
    depth: Int[np.ndarray | Array, "*s n"]
    mask: Bool[np.ndarray | Array, "*s n n"]
    guess_depth: Int[np.ndarray | Array, "*s n"]
    guess_rank: Int[np.ndarray | Array, "*s n"]
    prompt: Int[np.ndarray | Array, "*s n"]
    paths: Int[np.ndarray | Array, "*s c p"]
    prompts: Int[np.ndarray | Array, "*s m1"]
    prompt_slots: Int[np.ndarray | Array, "*s m1 k"]


def tree_tables(tree: CandidateTree, prompts: Int[np.ndarray, "m"], k: int) -> TreeTables:
    """Tables of a tree whose candidates carry ``prompts`` prompt tokens each, and the root k."""
    nodes: list[Path] = [(), *tree.paths]
    counts = np.asarray([k, *prompts.tolist()], np.int32)
    parent = [-1, *(tree.parents() + 1).tolist()]
    depth = [len(path) for path in nodes]
    prompt = [-1] * len(nodes)
    prompt_slots = np.full((len(nodes), k), -1, np.int32)
    for node, count in enumerate(counts.tolist()):
        for j in range(count):
            prompt_slots[node, j] = len(parent)
            parent.append(node if j == 0 else len(parent) - 1)
            depth.append(len(nodes[node]) + j + 1)
            prompt.append(j)
    padding = [-1] * (len(parent) - len(nodes))
    ints = lambda values: np.asarray(values, np.int32)
    return TreeTables(
        real=np.ones(len(parent), bool),
        parent=ints(parent),
        depth=ints(depth),
        mask=ancestors(ints(parent)),
        guess_depth=ints([len(path) - 1 for path in nodes] + padding),
        guess_rank=ints([path[-1] if path else -1 for path in nodes] + padding),
        prompt=ints(prompt),
        paths=leaf_paths(nodes),
        prompts=counts,
        prompt_slots=prompt_slots,
    )


def ancestors(parent: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n n"]:
    """mask[i, j]: j is i or an ancestor of i. Parents come before children; -1 has none."""
    mask = np.eye(len(parent), dtype=bool)
    for slot, above in enumerate(parent.tolist()):
        if above >= 0:
            mask[slot] |= mask[above]
    return mask


def leaf_paths(nodes: Sequence[Path]) -> Int[np.ndarray, "c p"]:
    """Slots from the root to every candidate without children, padded with -1; in the order of the leaves."""
    slot = {path: index for index, path in enumerate(nodes)}
    inner = {path[:-1] for path in nodes if path}
    leaves = [path for path in nodes if path not in inner]
    paths = np.full((len(leaves), 1 + max(len(path) for path in nodes)), -1, np.int32)
    for row, path in enumerate(leaves):
        paths[row, : len(path) + 1] = [slot[path[:i]] for i in range(len(path) + 1)]
    return paths


def stack_tables(tables: Sequence[TreeTables]) -> TreeTables:
    """The tables of all states with a leading axis, padded to the largest.

    Padding is -1 (0 for depths and counts, False for flags), and a padded slot sees itself only.
    """

    def stack(*leaves: np.ndarray) -> np.ndarray:
        shape = (len(leaves), *np.max([leaf.shape for leaf in leaves], axis=0))
        whole = np.full(shape, -1 if leaves[0].dtype == np.int32 else False, leaves[0].dtype)
        for part, leaf in zip(whole, leaves, strict=True):
            part[tuple(slice(size) for size in leaf.shape)] = leaf
        return whole

    whole = jax.tree.map(stack, *tables)
    return dataclasses.replace(
        whole,
        depth=np.maximum(whole.depth, 0),
        prompts=np.maximum(whole.prompts, 0),
        mask=whole.mask | np.eye(whole.mask.shape[-1], dtype=bool),
    )
