"""Whether a network does the same under all executors: to be asked once of every description written by hand."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dyncomp.runtime.executed import Executed
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.host import HostExecutor
from dyncomp.runtime.segments import Segmented
from dyncomp.runtime.stream import StreamExecutor
from dyncomp.runtime.traced import CompactExecutor, LaxExecutor, MaskedExecutor


@dataclasses.dataclass(frozen=True)
class Agreement:
    """All executors against masked execution.

    Attributes:
      error: largest difference of an output or score of an example that is not near, over the largest output.
      differ: examples, not near, that took another way somewhere.
      near: examples with a score within the tolerance of its threshold: rounding may send them elsewhere.
      visits: int [b s], as masked execution has them.
      outputs: its outputs.
    """

    error: float
    differ: int
    near: int
    visits: np.ndarray
    outputs: np.ndarray


class _Found(NamedTuple):
    outputs: np.ndarray
    exits: np.ndarray
    visits: np.ndarray | None = None
    scores: np.ndarray | None = None


def agreement(
    net: Segmented, inputs: Any, *, buckets: tuple[int, ...] = (), tolerance: float = 1e-5
) -> Agreement:
    """Runs a batch under every executor.

    Args:
      net: the network.
      inputs: [b ...].
      buckets: row counts for those that pack examples; default: 1 and the whole batch.
      tolerance: see ``near``.
    """
    b = len(inputs)
    sizes = tuple(sorted({*(buckets or (1,)), b}))
    reference, graph = MaskedExecutor(net)(inputs), Graph.of(net)
    near = _near(net, graph, reference, tolerance)
    host = HostExecutor(net, inputs, capacity=b, buckets=sizes)
    found = [
        *(_of(run(inputs)) for run in (LaxExecutor(net), CompactExecutor(net, sizes), host)),
        _of(_ahead(host)(inputs)),
        _streamed(StreamExecutor(net, inputs, bucket=sizes[0]), inputs),
    ]
    away = np.zeros(b, bool)
    error, scale = 0.0, max(float(np.abs(reference.outputs).max()), 1e-30)
    for one in found:
        away |= one.exits != reference.exits
        error = max(error, _gap(one.outputs, reference.outputs, ~near) / scale)
        if one.visits is not None and one.scores is not None:
            away |= (one.visits != reference.visits).any(axis=1)
            error = max(error, _gap(one.scores, reference.scores, ~near) / scale)
    differ = int((away & ~near).sum())
    return Agreement(error, differ, int(near.sum()), reference.visits, reference.outputs)


def _ahead(host: HostExecutor) -> HostExecutor:
    host.speculate = True
    return host


def _of(ran: Executed) -> _Found:
    return _Found(ran.outputs, ran.exits, ran.visits, ran.scores)


def _streamed(stream: StreamExecutor, inputs: Any) -> _Found:
    stream.submit(inputs)
    left = sorted(stream.drain(), key=lambda one: one.ticket)
    return _Found(np.stack([one.output for one in left]), np.asarray([one.exit for one in left]))


def _near(net: Segmented, graph: Graph, ran: Executed, tolerance: float) -> np.ndarray:
    """bool [b], whether a score that decided lies within the tolerance of its threshold."""
    tau = np.zeros(graph.end)
    tau[: len(net.thresholds)] = np.asarray(net.thresholds, np.float64)
    deciding = np.asarray([graph.decides(index) for index in range(graph.end)])
    with np.errstate(invalid="ignore"):
        close = np.abs(ran.scores - tau) <= tolerance
    return np.any(close & deciding & (ran.visits > 0), axis=1)


def _gap(ours: np.ndarray, wanted: np.ndarray, which: np.ndarray) -> float:
    """Largest difference among some examples; infinite where only one of two numbers is none."""
    ours, wanted = (np.asarray(v[which], np.float64) for v in (ours, wanted))
    if not wanted.size:
        return 0.0
    if (np.isnan(ours) != np.isnan(wanted)).any():
        return float("inf")
    return float(np.nan_to_num(np.abs(ours - wanted)).max())
