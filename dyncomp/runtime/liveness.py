"""Which values cross the boundaries between segments: what a segment reads, what it changes, what is still wanted.

A leaf of the carry is gathered where a segment reads it, and written back where the segment changed it and some way
onward reads it before it is written again. The carry has all its leaves from the start (`Segmented.begin` makes them),
so whatever a segment reads exists on every path that leads to it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import Segmented


@dataclasses.dataclass(frozen=True)
class Liveness:
    """Leaves of the carry, by their number in its flat order, that cross each segment's boundaries.

    Attributes:
      gathered: of each segment, what is fetched from the buffer before it.
      written: of each, what is put back after it.
    """

    gathered: tuple[frozenset[int], ...]
    written: tuple[frozenset[int], ...]

    def moved(self, carry: Sequence[jax.ShapeDtypeStruct]) -> list[tuple[int, int]]:
        """Bytes of one row that each segment gathers and writes; ``carry``: shape and dtype of a slot's leaves."""
        size = lambda which: sum(carry[n].size * carry[n].dtype.itemsize for n in which)
        return [
            (size(one), size(two)) for one, two in zip(self.gathered, self.written, strict=True)
        ]


def find_liveness(net: Segmented, graph: Graph, carry: Any) -> Liveness:
    """What has to be moved.

    Args:
      net: the network.
      graph: its own.
      carry: shapes and dtypes of one example's, with a leading axis.
    """
    used = [_used(segment, carry) for segment in net.segments]
    everything = frozenset(range(len(jax.tree.leaves(carry))))
    reads = [frozenset(), *(found[0] for found in used[1:])]
    writes = [everything, *(found[1] for found in used[1:])]
    wanted = live_after(graph.targets, reads, writes)
    return Liveness(
        tuple(reads), tuple(own & live for own, live in zip(writes, wanted, strict=True))
    )


def everything_moves(graph: Graph, leaves: int) -> Liveness:
    """Every leaf is gathered before and written after every segment: what liveness saves is seen against this."""
    every = frozenset(range(leaves))
    gathered = (frozenset(), *[every] * (graph.end - 1))
    written = tuple(frozenset() if graph.ends(index) else every for index in range(graph.end))
    return Liveness(gathered, written)


def live_after(
    targets: Sequence[Sequence[int]],
    reads: Sequence[frozenset[int]],
    writes: Sequence[frozenset[int]],
) -> list[frozenset[int]]:
    """Of each segment, the values that some way onward reads before it writes them; loops by a fixed point.

    Args:
      targets: of each segment, which may follow; the number past the last is the end.
      reads: what each reads.
      writes: what each overwrites, whatever it was.
    """
    end = len(targets)
    before: list[frozenset[int]] = [*reads, frozenset()]
    while True:
        after = [frozenset().union(*(before[t] for t in row)) for row in targets]
        again = [reads[n] | (after[n] - writes[n]) for n in range(end)] + [frozenset()]
        if again == before:
            return after
        before = again


def _used(segment: Any, carry: Any) -> tuple[frozenset[int], frozenset[int]]:
    """(leaves that a segment reads, leaves that it does not hand on as they are)."""
    tau = jax.ShapeDtypeStruct((), jnp.float32)
    run = lambda carry, weights, threshold: segment.run(weights, carry, threshold)
    jaxpr = jax.make_jaxpr(run)(carry, segment.weights, tau).jaxpr
    count = len(jax.tree.leaves(carry))
    own, handed = jaxpr.invars[:count], jaxpr.outvars[:count]
    kept = {n for n in range(count) if handed[n] is own[n]}
    # A leaf that goes to another place, or to a result, is read as much as one that a computation takes.
    asked = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    asked |= {id(v) for v in jaxpr.outvars[count:]}
    asked |= {id(v) for n, v in enumerate(handed) if n not in kept}
    reads = frozenset(n for n in range(count) if id(own[n]) in asked)
    return reads, frozenset(range(count)) - kept
