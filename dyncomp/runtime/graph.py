"""Where examples may go after each segment: the control graph of a decided network, static and checked once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.runtime.segments import END, Segment, Segmented


@dataclasses.dataclass(frozen=True)
class Graph:
    """Segments by number, in the order they are listed; the number after the last is the end.

    Attributes:
      names: of each segment.
      targets: of each, the numbers of the segments that may follow.
      trips: of each, how often one example runs it at most; 0 for segments that lead forward only.
    """

    names: tuple[str, ...]
    targets: tuple[tuple[int, ...], ...]
    trips: tuple[int, ...]

    @classmethod
    def of(cls, net: Segmented) -> "Graph":
        """The graph of a network.

        Raises:
          DyncompError: a name is given twice or unknown, a loop has no bound or no way out, a segment is never reached.
        """
        names = tuple(part.name or f"segment_{i}" for i, part in enumerate(net.segments))
        if len(set(names)) < len(names):
            raise DyncompError(f"two segments have one name: {', '.join(names)}; rename one")
        targets = tuple(_numbers(names, index, part) for index, part in enumerate(net.segments))
        reached = {0, *(number for row in targets for number in row)}
        for index, name in enumerate(names):
            if index not in reached:
                raise DyncompError(
                    f"segment {name!r} is never reached; name it in a segment's targets"
                )
        return cls(names, targets, tuple(part.max_trips for part in net.segments))

    @property
    def end(self) -> int:
        """The number that stands for having left."""
        return len(self.names)

    @property
    def sweeps(self) -> int:
        """How many passes over all segments in order bring every example to the end."""
        return 1 + sum(trips - 1 for trips in self.trips if trips)

    @functools.cached_property
    def chain(self) -> bool:
        """Whether every segment leads to the next or to the end: then all that go on wait at one segment."""
        return all({*row} <= {i + 1, self.end} for i, row in enumerate(self.targets))

    def decides(self, index: int) -> bool:
        """Whether more than one segment may follow."""
        return len(self.targets[index]) > 1

    @functools.cached_property
    def deciding(self) -> np.ndarray:
        """bool [s], `decides` of every segment."""
        return np.asarray([self.decides(index) for index in range(self.end)])

    def ends(self, index: int) -> bool:
        """Whether all leave after it."""
        return self.targets[index] == (self.end,)

    def onward(self, index: int, route: Any, runs: Any) -> Any:
        """int32 [b], the number of the segment that follows ``index``.

        Args:
          index: static.
          route: bool or int [b], which of the targets; with one target it is not looked at.
          runs: int [b], how often each example has run this segment, this time included.
        """
        xp = jnp if isinstance(route, jax.Array) else np
        targets = xp.asarray(self.targets[index], xp.int32)
        if len(targets) == 1:
            return xp.full(route.shape, targets[0], xp.int32)
        last = len(targets) - 1
        choice = xp.minimum(xp.maximum(route.astype(xp.int32), 0), last)  # numpy's clip is slow
        if self.trips[index]:
            choice = xp.where(runs >= self.trips[index], last, choice)
        return targets[choice]


def _numbers(names: tuple[str, ...], index: int, part: Segment) -> tuple[int, ...]:
    end = len(names)
    if not part.targets:
        found: tuple[int, ...] = (end,) if index == end - 1 else (index + 1, end)
    else:
        known = {**{name: number for number, name in enumerate(names)}, END: end}
        missing = [name for name in part.targets if name not in known]
        if missing:
            raise DyncompError(
                f"segment {names[index]!r} leads to {missing[0]!r}; use one of {', '.join(known)}"
            )
        found = tuple(known[name] for name in part.targets)
    if 0 in found:
        raise DyncompError(
            f"segment {names[index]!r} leads back to the first, which begins; put a segment before the loop"
        )
    back = any(number <= index for number in found)
    if back and (part.max_trips < 1 or found[-1] <= index):
        raise DyncompError(
            f"segment {names[index]!r} leads back; give it max_trips >= 1 and a last target further on"
        )
    if part.max_trips and not back:
        raise DyncompError(f"segment {names[index]!r} never leads back; leave max_trips out")
    return found
