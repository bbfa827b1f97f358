"""Trees of guesses: which candidates a verification pass holds, and how many prompt tokens each carries.

Host-side numpy, once for a model. A path (r_1, .., r_n) is the candidate "the r_i-th best guess for i tokens ahead,
for each i"; its nodes are its prefixes, its root the newest token that is certain. ``acc[i, r]`` is the measured
probability that the r-th guess at depth i + 1 is right, given that its ancestors are. Parallel prompt decoding (arXiv
2405.18628) and its released code; every node also carries 1..k prompt tokens, which guess what follows it.
Letters: ``k`` depths (prompt tokens), ``r`` ranks of a guess, ``m`` candidates.
"""

import dataclasses
import heapq
from typing import TypeAlias

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int

Path: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CandidateTree:
    """Candidates, parents before children.

    Attributes:
      paths: ranks from the root; a path's length is its depth.
      probability: float64 [m], that a candidate is accepted: the product of acc along its path.
    """

    paths: tuple[Path, ...]
    probability: Float[np.ndarray, "m"]

    def parents(self) -> Int[np.ndarray, "m"]:
        """Index of each candidate's parent; -1 is the root."""
        place = {path: index for index, path in enumerate(self.paths)}
        return np.asarray([place.get(path[:-1], -1) for path in self.paths], np.int64)

    def last(self) -> Float[np.ndarray, "m"]:
        """Probability that a candidate is the last one accepted: its own minus its children's."""
        return self._left()[:-1]

    def none(self) -> float:
        """Probability that no candidate is accepted. With `last`, sums to 1."""
        return float(self._left()[-1])

    def expected(self) -> float:
        """f: expected number of accepted candidates, the sum of all path probabilities."""
        return float(self.probability.sum())

    def _left(self) -> np.ndarray:
        """Of every candidate and, at the end, the root: probability minus that of its children."""
        left = np.append(self.probability, 1.0)
        np.subtract.at(left, self.parents(), self.probability)
        return left


def candidate_tree(acc: Float[np.ndarray, "k r"], depth: int, size: int) -> CandidateTree:
    """The ``size`` paths of at most ``depth`` tokens with the largest product of acc.

    Best first; of equals the shorter, then the lower ranks. No path is likelier than its parent, so the set is closed
    under parents.

    Raises:
      DyncompError: acc is no table of probabilities, depth not in 1..k, or more paths wanted than there are.
    """
    check_accuracy(acc)
    depths, ranks = acc.shape
    available = sum(ranks**i for i in range(1, depth + 1))
    if not 1 <= depth <= depths or not 1 <= size <= available:
        raise DyncompError(
            f"candidate_tree: depth={depth} of 1..{depths}, size={size} of 1..{available}"
        )
    table = acc.astype(np.float64)
    paths: list[Path] = []
    values: list[float] = []
    heap: list[tuple[float, int, Path]] = [(-table[0, rank], 1, (rank,)) for rank in range(ranks)]
    heapq.heapify(heap)
    while len(paths) < size:
        value, length, path = heapq.heappop(heap)
        paths.append(path)
        values.append(-value)
        if length < depth:
            for rank in range(ranks):
                heapq.heappush(heap, (value * table[length, rank], length + 1, (*path, rank)))
    return CandidateTree(tuple(paths), np.asarray(values))


def random_tree(
    rng: np.random.Generator, acc: Float[np.ndarray, "k r"], depth: int, size: int
) -> CandidateTree:
    """A control: ``size`` paths grown by adding a random child of what is there, uniformly over open places."""
    check_accuracy(acc)
    table, ranks = acc.astype(np.float64), acc.shape[1]
    open_places: list[Path] = [(rank,) for rank in range(ranks)]
    paths: list[Path] = []
    while len(paths) < size:
        if not 1 <= depth <= len(table) or not open_places:
            raise DyncompError(f"random_tree: no {size} paths of depth 1..{depth}")
        path = open_places.pop(int(rng.integers(len(open_places))))
        paths.append(path)
        if len(path) < depth:
            open_places += [(*path, rank) for rank in range(ranks)]
    values = [np.prod([table[i, rank] for i, rank in enumerate(path)]) for path in paths]
    return CandidateTree(tuple(paths), np.asarray(values, np.float64))


def spread_prompts(
    tree: CandidateTree, expected: Float[np.ndarray, "k"], budget: int
) -> Int[np.ndarray, "m"]:
    """Prompt tokens of each candidate, by greedy removal (arXiv 2405.18628; the released code).

    All start with k. While candidates and prompts exceed the budget, the prompt goes whose loss is smallest:
    last(node) * (f_d - f_{d-1}), d being how many the node still has; each keeps at least one. Of equals, the
    first. The root and its own k prompts are not counted: a pass is budget + 1 + k slots wide at most.

    Args:
      tree: candidates.
      expected: f_d, d = 1..k: expected acceptance of the tree that d prompts lead to.
      budget: bound on candidates + prompts.

    Raises:
      DyncompError: even one prompt a candidate exceeds the budget.
    """
    size, k = len(tree.paths), len(expected)
    if 2 * size > budget:
        raise DyncompError(
            f"spread_prompts: {size} candidates with a prompt each exceed the budget of {budget}"
        )
    # The last entry, of a prompt that must stay, is never the smallest.
    gain = np.append(np.inf, np.diff(expected))
    prompts = np.full(size, k, np.int64)
    last = np.maximum(tree.last(), 0.0)
    loss = np.where(prompts > 1, last * gain[-1], np.inf) if k > 1 else np.full(size, np.inf)
    for _ in range(size + k * size - budget):
        node = int(np.argmin(loss))
        prompts[node] -= 1
        loss[node] = last[node] * gain[prompts[node] - 1] if prompts[node] > 1 else np.inf
    return prompts


def check_accuracy(acc: Float[np.ndarray, "k r"]) -> None:
    """Refuses what is no table of probabilities of disjoint events in each row."""
    if acc.size == 0 or not np.all(acc >= 0) or np.any(acc.sum(axis=1) > 1 + 1e-6):
        raise DyncompError("acc: each row needs probabilities >= 0 that sum to at most 1")
