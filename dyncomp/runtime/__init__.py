"""Fast execution of networks that decide: segments, buckets, executors."""

from dyncomp.runtime.encoder_decoder import from_saturating
from dyncomp.runtime.executed import Executed
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.host import HostExecutor
from dyncomp.runtime.per_example import per_example
from dyncomp.runtime.saved import load_segments, save_segments
from dyncomp.runtime.segments import END, Segment, Segmented, from_model
from dyncomp.runtime.stream import Finished, StreamExecutor
from dyncomp.runtime.traced import CompactExecutor, LaxExecutor, MaskedExecutor, Traced

__all__ = [
    "END",
    "CompactExecutor",
    "Executed",
    "Finished",
    "Graph",
    "HostExecutor",
    "LaxExecutor",
    "MaskedExecutor",
    "Segment",
    "Segmented",
    "StreamExecutor",
    "Traced",
    "from_model",
    "from_saturating",
    "load_segments",
    "per_example",
    "save_segments",
]
