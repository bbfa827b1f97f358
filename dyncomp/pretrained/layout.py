"""Two layouts of one tensor, written like ``"(h p) d -> d h p"``: theirs on the left, ours on the right.

A digit on the left is an axis of several tensors fused into one: ``"d (3 h p) -> d h p"`` with ``part=0`` is the first
third. `ours` returns a view, never a copy, so reading assigns from it and writing assigns to it: one table serves both
directions.
"""

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of an architecture's table.

    Attributes:
      ours: path of the parameter inside its block (or inside the model), parts joined by "/".
      theirs: name of the tensor; ``{i}`` is the layer, ``{e}`` the expert.
      pattern: both layouts of one layer's (one expert's) tensor.
      part: which part of a fused axis.
    """

    ours: str
    theirs: str
    pattern: str
    part: int = 0

    @property
    def lead(self) -> int:
        """Axes of our stacked parameter that run over tensors: layers, then experts."""
        return ("{i}" in self.theirs) + ("{e}" in self.theirs)

    @property
    def rank(self) -> int:
        """Axes of our stacked parameter; tells a bank of experts from a dense unit of the same name."""
        return self.lead + len(_parse(self.pattern)[1])

    def name(self, layer: int, place: tuple[int, ...]) -> str:
        """The tensor's name for a place on the lead axes."""
        return self.theirs.format(i=layer, e=place[-1] if place else 0)

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of their tensor for the shape of ours, lead axes left out."""
        left, right = _parse(self.pattern)
        sizes = dict(zip(right, ours, strict=True))
        return tuple(math.prod(_size(letter, sizes) for letter in group) for group in left)

    def view(self, tensor: np.ndarray, ours: tuple[int, ...]) -> np.ndarray:
        """Their tensor (contiguous, of `shape`) seen in our layout; shares memory."""
        left, right = _parse(self.pattern)
        sizes = dict(zip(right, ours, strict=True))
        letters = [letter for group in left for letter in group]
        split = tensor.reshape([_size(letter, sizes) for letter in letters])
        chosen = tuple(self.part if letter.isdigit() else slice(None) for letter in letters)
        kept = [letter for letter in letters if not letter.isdigit()]
        return split[chosen].transpose([kept.index(letter) for letter in right])


def _size(letter: str, sizes: dict[str, int]) -> int:
    return int(letter) if letter.isdigit() else sizes[letter]


@functools.cache
def _parse(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Axes of the left side, each a tuple of letters, and letters of the right side."""
    left, right = pattern.split(" -> ")
    groups: list[tuple[str, ...]] = []
    for piece in left.replace("(", "|(").replace(")", ")|").split("|"):
        if piece.startswith("("):
            groups.append(tuple(piece.strip("()").split()))
        else:
            groups += [(letter,) for letter in piece.split()]
    return tuple(groups), tuple(right.split())
