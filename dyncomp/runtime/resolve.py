"""Decisions that are known when a network is built: other ways are cut, and what is left in a row is one segment."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import END, Segment, Segmented


def resolve(net: Segmented, routes: Mapping[str, int]) -> Segmented:
    """The network under some decisions that no example changes (DyCL's static branches, arXiv 2307.04963).

    Segments that nothing reaches any more are dropped, and every straight row of segments becomes one: a network
    without decisions is one program, the one that would be written by hand. A fused segment is named after its parts,
    ``a+b``, and has the last one's output and score. Prices add up, those of exits that nobody reads included.

    Args:
      net: the network.
      routes: name of a segment -> which of its targets always follows.

    Raises:
      DyncompError: no such segment, no such target, or one that leads back (write such a loop out).
    """
    graph = Graph.of(net)
    targets = [list(row) for row in graph.targets]
    for name, route in routes.items():
        index = _find(graph, name, route)
        targets[index] = [targets[index][route]]
    reached = _reached(targets)
    thresholds = [*net.thresholds, *[0.0] * (graph.end - len(net.thresholds))]
    rows = _rows(targets, reached)
    names = {row[0]: "+".join(graph.names[n] for n in row) for row in rows} | {graph.end: END}
    segments, kept = [], []
    for row in rows:
        parts = [net.segments[n] for n in row]
        after = targets[row[-1]]
        back = any(target <= row[-1] for target in after)
        segments.append(
            dataclasses.replace(
                _fused(parts, [float(thresholds[n]) for n in row[:-1]]),
                name=names[row[0]],
                targets=tuple(names[target] for target in after),
                max_trips=parts[-1].max_trips if back else 0,
            )
        )
        kept.append(thresholds[row[-1]])
    return dataclasses.replace(net, segments=segments, thresholds=kept)


def _find(graph: Graph, name: str, route: int) -> int:
    if name not in graph.names:
        raise DyncompError(f"no segment {name!r}; use one of {', '.join(graph.names)}")
    index = graph.names.index(name)
    if not 0 <= route < len(graph.targets[index]):
        raise DyncompError(
            f"segment {name!r} has {len(graph.targets[index])} targets: route {route} is none"
        )
    if graph.targets[index][route] <= index:
        raise DyncompError(
            f"segment {name!r}: route {route} leads back, always; write the loop out as segments"
        )
    return index


def _reached(targets: Sequence[Sequence[int]]) -> list[int]:
    """Segments that some way from the first leads to, in order."""
    seen, new = {0}, [0]
    while new:
        new = [t for n in new for t in targets[n] if t < len(targets) and t not in seen]
        seen |= set(new)
    return sorted(seen)


def _rows(targets: Sequence[Sequence[int]], reached: Sequence[int]) -> list[list[int]]:
    """The segments that are left, those in a straight row together."""
    sources: dict[int, list[int]] = {}
    for index in reached:
        for target in set(targets[index]):
            sources.setdefault(target, []).append(index)
    follows = {
        index: targets[index][0]
        for index in reached
        if len(targets[index]) == 1 and sources[targets[index][0]] == [index]
    }
    follows = {a: b for a, b in follows.items() if b < len(targets)}
    rows = []
    for head in reached:
        if head in follows.values():
            continue
        row = [head]
        while row[-1] in follows:
            row.append(follows[row[-1]])
        rows.append(row)
    return rows


def _fused(parts: Sequence[Segment], fixed: Sequence[float]) -> Segment:
    """Segments that run one after the other as one; ``fixed``: thresholds of all but the last."""
    if len(parts) == 1:
        return parts[0]

    def run(weights: Any, carry: Any, threshold: Any) -> Any:
        for part, own, tau in zip(parts, weights, fixed, strict=False):
            carry, *_ = part.run(own, carry, jnp.float32(tau))
        return parts[-1].run(weights[-1], carry, threshold)

    cost = sum((part.cost for part in parts), Cost(0))
    return Segment(run, tuple(part.weights for part in parts), cost)
