"""Fast execution of networks that decide: segments, buckets, executors."""

from dyncomp.runtime.agreement import Agreement, agreement
from dyncomp.runtime.encoder_decoder import from_saturating
from dyncomp.runtime.executed import Executed
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.host import HostExecutor
from dyncomp.runtime.language import greedy
from dyncomp.runtime.per_example import per_example
from dyncomp.runtime.resolve import resolve
from dyncomp.runtime.saved import load_segments, save_segments
from dyncomp.runtime.segments import END, Segment, Segmented, from_model, whole
from dyncomp.runtime.solves import (
    Solved,
    SolveSegments,
    fixed_point_segments,
    from_continuous,
    ode_segments,
)
from dyncomp.runtime.steps import from_steps
from dyncomp.runtime.stream import Finished, StreamExecutor
from dyncomp.runtime.traced import CompactExecutor, LaxExecutor, MaskedExecutor, Traced

__all__ = [
    "Agreement",
    "CompactExecutor",
    "END",
    "Executed",
    "Finished",
    "Graph",
    "HostExecutor",
    "LaxExecutor",
    "MaskedExecutor",
    "Segment",
    "Segmented",
    "SolveSegments",
    "Solved",
    "StreamExecutor",
    "Traced",
    "agreement",
    "fixed_point_segments",
    "from_continuous",
    "from_model",
    "from_saturating",
    "from_steps",
    "greedy",
    "load_segments",
    "ode_segments",
    "per_example",
    "resolve",
    "save_segments",
    "whole",
]
