"""The chain of trees that follow one another, and the sizes that make it accept most.

State n (1..k) is "the last accepted node carried n prompt tokens", so that the next pass uses the tree of depth n.
Where no candidate is accepted the last node is the root, which carries all k. Host-side numpy (arXiv 2405.18628).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int
from dyncomp.decoding.tree import CandidateTree, candidate_tree, random_tree, spread_prompts


@dataclasses.dataclass(frozen=True)
class TreeFamily:
    """One tree for each state, shallowest first, with the prompts of each candidate.

    Attributes:
      trees: k of them; tree n - 1 is of depth n at most.
      prompts: int [m] for each tree, 1..k.
    """

    trees: tuple[CandidateTree, ...]
    prompts: tuple[Int[np.ndarray, "_"], ...]

    def expected(self) -> Float[np.ndarray, "k"]:
        """f_n: expected accepted candidates in each state."""
        return np.asarray([tree.expected() for tree in self.trees])

    def transitions(self) -> Float[np.ndarray, "k k"]:
        """Row-stochastic [from to]: where a state leads; accepting nothing leads to the deepest."""
        move = self._accepted()
        move[:, -1] += [tree.none() for tree in self.trees]
        return move

    def stationary(self) -> Float[np.ndarray, "k"]:
        """Share of passes in each state in the long run, starting from the deepest."""
        return long_run(self.transitions(), start=-1)

    def accepted(self) -> float:
        """Expected accepted candidates a pass in the long run; a pass writes one token more."""
        return float(self.stationary() @ self.expected())

    def accepted_as_released(self) -> tuple[float, float]:
        """(what the released code reports, the share pi_0 of its fictitious state).

        Its chain has a state 0, "nothing was accepted", that takes one empty pass before the deepest state. The real
        decoder has no such pass. So this is `accepted` times 1 - pi_0, and sizes chosen by it can be off.
        """
        k = len(self.trees)
        move = np.zeros((k + 1, k + 1))
        move[0, k] = 1.0
        move[1:, 0] = [tree.none() for tree in self.trees]
        move[1:, 1:] = self._accepted()
        share = long_run(move, start=-1)
        return float(share[1:] @ self.expected()), float(share[0])

    def widths(self) -> Int[np.ndarray, "k"]:
        """Slots of each tree's pass: root, its k prompts, candidates and theirs."""
        k = len(self.trees)
        return np.asarray([1 + k + len(p) + int(p.sum()) for p in self.prompts])

    def _accepted(self) -> Float[np.ndarray, "k k"]:
        """[from to] probability that the last accepted node is a candidate with ``to`` prompts."""
        move = np.zeros((len(self.trees), len(self.trees)))
        for state, (tree, prompts) in enumerate(zip(self.trees, self.prompts, strict=True)):
            np.add.at(move[state], prompts - 1, tree.last())
        return move


def long_run(transitions: Float[np.ndarray, "n n"], start: int) -> Float[np.ndarray, "n"]:
    """Share of time that a chain spends in each state when it starts in ``start``.

    By squaring (P + I) / 2, which has the stationary distributions of P and no period, until nothing moves: also right
    where some states can't be reached.
    """
    power = (transitions + np.eye(len(transitions))) / 2
    for _ in range(64):
        square = power @ power
        power = square / square.sum(axis=1, keepdims=True)
    return power[start]


def tree_family(acc: Float[np.ndarray, "k r"], sizes: Sequence[int], budget: int) -> TreeFamily:
    """The best trees of the given sizes (depth 1 first), with prompts spread to fit the budget."""
    if len(sizes) != len(acc):
        raise DyncompError(f"tree_family: {len(acc)} depths need as many sizes, got {len(sizes)}")
    trees = tuple(candidate_tree(acc, depth, size) for depth, size in enumerate(sizes, 1))
    return _spread(trees, budget)


def random_family(
    rng: np.random.Generator, acc: Float[np.ndarray, "k r"], sizes: Sequence[int], budget: int
) -> TreeFamily:
    """A control: `tree_family` with random trees of the same sizes, prompts spread by the same rule."""
    trees = tuple(random_tree(rng, acc, depth, size) for depth, size in enumerate(sizes, 1))
    return _spread(trees, budget)


def static_family(acc: Float[np.ndarray, "k r"], size: int) -> TreeFamily:
    """The same best tree of ``size`` candidates in every state, with k prompts after each: nothing is dynamic."""
    k = len(acc)
    return TreeFamily((candidate_tree(acc, k, size),) * k, (np.full(size, k, np.int64),) * k)


def _spread(trees: tuple[CandidateTree, ...], budget: int) -> TreeFamily:
    expected = np.asarray([tree.expected() for tree in trees])
    return TreeFamily(trees, tuple(spread_prompts(tree, expected, budget) for tree in trees))


def best_family(
    acc: Float[np.ndarray, "k r"], budget: int, *, first: int = 10, released: bool = False
) -> TreeFamily:
    """The family with most accepted candidates a pass, over sizes of the trees of depth 2..k.

    Sizes range from budget // (k + 1), where every candidate keeps k prompts, to budget // 2, where each keeps one; the
    tree of depth 1 has ``first`` nodes (10 in the released code). Of equals, the first in that order.

    Args:
      acc: measured on data that acceptance is not reported on.
      budget: candidates + prompts of a pass, see `spread_prompts`.
      first: capped by the ranks there are and by budget // 2.
      released: judge by `TreeFamily.accepted_as_released`.
    """
    depths, ranks = acc.shape
    if budget < 2:
        raise DyncompError(f"best_family: budget={budget}; a candidate and its prompt need 2")
    choices = [[min(first, ranks, budget // 2)]]
    for depth in range(2, depths + 1):
        most = min(budget // 2, sum(ranks**i for i in range(1, depth + 1)))
        choices.append(list(range(min(max(budget // (depths + 1), 1), most), most + 1)))
    # A tree of a given depth is a prefix of the larger ones: build each once.
    largest = [candidate_tree(acc, depth, sizes[-1]) for depth, sizes in enumerate(choices, 1)]
    best, best_value = None, -np.inf
    for sizes in itertools.product(*choices):
        trees = tuple(
            CandidateTree(tree.paths[:size], tree.probability[:size])
            for tree, size in zip(largest, sizes, strict=True)
        )
        family = _spread(trees, budget)
        value = family.accepted_as_released()[0] if released else family.accepted()
        if value > best_value:
            best, best_value = family, value
    assert best is not None
    return best


def best_budget(tokens: Mapping[int, float], latency: Mapping[int, float]) -> int:
    """The budget N with the largest tokens(N) / latency(N): tau(N) / L_fp(N) of arXiv 2405.18628.

    Budget 0 is plain decoding, one token a pass. Where ``latency`` has it, it wins unless a tree is faster.

    Args:
      tokens: tokens a pass writes, 1 + `TreeFamily.accepted`, by budget.
      latency: measured time of a pass by budget, in any unit.
    """
    tokens = {0: 1.0, **tokens} if 0 in latency else tokens
    if not tokens or tokens.keys() != latency.keys() or min(latency.values()) <= 0:
        raise DyncompError("best_budget: tokens and positive latencies of the same budgets")
    return max(sorted(tokens), key=lambda n: tokens[n] / latency[n])
