"""Patterns that each layer and head is given at run time: others compile nothing, and layers may be scanned.

`Attention` hands them what the variables hold under ``controls`` for the layer, at ``mixer/pattern``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp

from dyncomp.attention.attend import attend_seen
from dyncomp.attention.chosen import Chosen, attend_chosen, by_head, of_lists
from dyncomp.attention.patterns import VerticalSlash, check_tile
from dyncomp.attention.sight import Sight
from dyncomp.core.aux import Count
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float
from dyncomp_kernels.sparse_attention.lists import a_shape_lists


class Choosing(Protocol):
    """A pattern that says what it chose."""

    def choose(self, q: Float[Array, "b t h p"], k: Array, sight: Sight) -> Chosen:
        """The plan of all heads."""
        ...

    def looks(self, t: int, s: int) -> int:
        """Products of queries and keys that choosing costs a head."""
        ...


@dataclasses.dataclass(frozen=True)
class Everything:
    """Dense causal attention as a pattern, by blocks: for heads that stay dense, and as the reference.

    Attributes:
      tile: queries and keys of a block where other patterns stand beside it.
    """

    tile: int = 64

    def __post_init__(self):
        check_tile(self)

    def __call__(self, q, k, v, sight):
        """`attend_seen`."""
        mixed, pairs = attend_seen(q, k, v, sight)
        return mixed, pairs.astype(jnp.float32)

    def choose(self, q: Array, k: Array, sight: Sight) -> Chosen:
        """All blocks up to a query's own."""
        s = k.shape[1]
        sizes = q.shape[1], s, self.tile, self.tile
        lists = a_shape_lists(*sizes, window=s, sink=s, offset=sight.place[0])
        return of_lists(lists, q.shape[2], q.shape[0])

    def looks(self, t: int, s: int) -> int:
        """None: nothing is looked at."""
        del t, s
        return 0


@dataclasses.dataclass(frozen=True)
class Assigned:
    """Another pattern for each head, as `PerHead`, named at run time by ``controls``: ``{"heads": int32 [h]}``.

    All patterns choose for all heads, which is cheap; one attention then runs over what each head's own chose. Patterns
    read whole blocks, `AShape` too.

    Attributes:
      patterns: what there is; tiles of one size.
    """

    patterns: tuple[Any, ...]

    def __post_init__(self):
        if len({pattern.tile for pattern in self.patterns}) != 1:
            raise DyncompError("Assigned.patterns: give one or more, all with the same tile")

    def __call__(self, q, k, v, sight, told: Mapping[str, Array] | None = None):
        """Mixed values, and pairs a head (needed: `Chosen.tiles`; executed: `Chosen.executed`)."""
        chosen = self.choose(q, k, sight, told)
        mixed, _ = attend_chosen(q, k, v, chosen, sight)
        each = [pattern.looks(q.shape[1], k.shape[1]) for pattern in self.patterns]
        own = jnp.float32(each)[self._index(q, told)]
        return mixed, _counted(chosen, q, sight, jnp.mean(own), float(sum(each)))

    def choose(
        self, q: Array, k: Array, sight: Sight, told: Mapping[str, Array] | None = None
    ) -> Chosen:
        """The plan of all heads; without ``told`` all take the first pattern.

        Raises:
          DyncompError: not one index a head.
        """
        choices = [pattern.choose(q, k, sight) for pattern in self.patterns]
        return by_head(choices, self._index(q, told))

    def _index(self, q: Array, told: Mapping[str, Array] | None) -> Array:
        heads = jnp.zeros((q.shape[2],), jnp.int32) if told is None else told["heads"]
        if heads.shape != (q.shape[2],):
            raise DyncompError(
                f"Assigned: {list(heads.shape)} indices for {q.shape[2]} heads; give one for each"
            )
        return jnp.clip(heads, 0, len(self.patterns) - 1)


@dataclasses.dataclass(frozen=True)
class FrozenLines:
    """`VerticalSlash` at the places of another input, which ``controls`` hold: what `VerticalSlash.lines` gave there.

    The control for choosing anew for each input.
    """

    lines: VerticalSlash

    def __call__(self, q, k, v, sight, told: Mapping[str, Array] | None = None):
        """As `Assigned`; without ``told`` (at initialisation) the input's own places."""
        told = self.lines.lines(q, k, sight) if told is None else told
        chosen = self.lines.spans(dict(told), q.shape[1], k.shape[1], sight)
        mixed, _ = attend_chosen(q, k, v, chosen, sight)
        return mixed, _counted(chosen, q, sight)


def _counted(
    chosen: Chosen, q: Array, sight: Sight, looked: Array | float = 0.0, looked_all: float = 0.0
) -> Count:
    """Pairs of a sequence, mean over heads and sequences: float32; ``looked`` at while choosing, too."""
    tile = chosen.spans.rows * chosen.spans.columns
    mean = lambda x: jnp.mean(x.astype(jnp.float32))
    needed = mean(chosen.tiles(sight.place[0])) * tile + looked
    return Count(needed, mean(chosen.executed(q.shape[1])) + looked_all)
