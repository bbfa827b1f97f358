"""What a decode step of attention costs under secret sharing, in operations: counts, never a time.

Secure multi-party computation pays for comparisons and exponentials far more than for products, and reading a slot
whose number is secret is a product with a one-hot vector. The counts are of one layer and one step. MPCache (arXiv
2501.06807) explains which parts cost; the formulas are ours.
"""

import dataclasses
import math
from typing import Literal

from dyncomp.core.errors import DyncompError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecretCounts:
    """Operations on secret values.

    Attributes:
      comparisons: of two numbers: box corners, ranking, and the maxima of softmax.
      equalities: tests that turn a chosen number into a one-hot vector.
      multiplications: of scores and of attention.
      softmax: elements (an exponential and a share of a division each).
      gathered: multiplications of one-hot vectors with what they fetch.
      ranked: items that are ranked, all lists together.
    """

    comparisons: int = 0
    equalities: int = 0
    multiplications: int = 0
    softmax: int = 0
    gathered: int = 0
    ranked: int = 0

    def __add__(self, other: "SecretCounts") -> "SecretCounts":
        names = [field.name for field in dataclasses.fields(self)]
        return SecretCounts(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def __mul__(self, times: int) -> "SecretCounts":
        names = [field.name for field in dataclasses.fields(self)]
        return SecretCounts(**{n: getattr(self, n) * times for n in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecretStep:
    """One query against ``tokens`` kept ones.

    Attributes:
      tokens: m, what the cache holds.
      heads, lists, width: query heads, lists (key/value heads), coordinates of a head.
      cluster, coarse: tokens of a cluster of either level; coarse None for one level.
      coarse_share: of coarse clusters whose children are ranked.
      score: "linear", "bound" (a comparison for each coordinate of each cluster, as published) or "signs" (the same
        bound from the query's positive and negative parts: a comparison for each coordinate of the query).
    """

    tokens: int
    heads: int
    lists: int
    width: int
    cluster: int = 16
    coarse: int | None = 32
    coarse_share: float = 0.5
    score: Literal["linear", "bound", "signs"] = "linear"

    def __post_init__(self):
        if min(self.tokens, self.heads, self.lists, self.width, self.cluster) < 1:
            raise DyncompError(f"SecretStep: {self}; use at least 1 of everything")
        if self.score not in ("linear", "bound", "signs"):
            raise DyncompError(f"SecretStep.score={self.score!r}: use 'linear', 'bound' or 'signs'")

    def attention(self, read: int) -> SecretCounts:
        """Over ``read`` tokens that lie at hand."""
        return SecretCounts(
            comparisons=self.heads * (read - 1),
            multiplications=2 * self.heads * read * self.width,
            softmax=self.heads * read,
        )

    def levels(self) -> list[int]:
        """Items that a list ranks at each level, the forced clusters' children not counted."""
        fine = -(-self.tokens // self.cluster)
        if self.coarse is None:
            return [fine]
        first = -(-self.tokens // self.coarse)
        return [first, self.coarse // self.cluster * int(self.coarse_share * first)]

    def selection(self, clusters: int) -> SecretCounts:
        """Scores, ranking, and one-hot vectors of the ``clusters`` that are read."""
        levels = self.levels()
        total = SecretCounts()
        for items in levels:
            total += self._scored(items)
        fine = -(-self.tokens // self.cluster)
        total += SecretCounts(equalities=self.lists * clusters * fine)
        if len(levels) == 2:  # centres of the children of chosen coarse clusters are fetched
            chosen, each = int(self.coarse_share * levels[0]), self.coarse // self.cluster  # type: ignore[operator]
            hot = self.lists * chosen * levels[0]
            total += SecretCounts(equalities=hot, gathered=hot * each * self.width)
        return total

    def gather(self, clusters: int) -> SecretCounts:
        """Keys and values of chosen clusters, by their one-hot vectors."""
        fine = -(-self.tokens // self.cluster)
        row = 2 * self.cluster * self.width
        return SecretCounts(gathered=self.lists * clusters * fine * row)

    def _scored(self, items: int) -> SecretCounts:
        ranked, width = self.lists * items, self.width
        order = self.lists * sorting_comparisons(items)
        if self.score == "linear":  # the heads' queries are added up first
            return SecretCounts(comparisons=order, multiplications=ranked * width, ranked=ranked)
        each = self.heads * width * (items if self.score == "bound" else 1)
        products = 2 * self.heads * items * width
        return SecretCounts(comparisons=order + each, multiplications=products, ranked=ranked)


def sorting_comparisons(items: int) -> int:
    """Comparators of a bitonic network, the usual way to sort secrets; items are padded to a power of two."""
    if items < 2:
        return 0
    depth = math.ceil(math.log2(items))
    return 2**depth // 2 * depth * (depth + 1) // 2
