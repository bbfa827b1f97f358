"""Fast execution of networks that decide: segments, buckets, executors."""

from dyncomp.runtime.executors import Executed, HostExecutor, MaskedExecutor
from dyncomp.runtime.segments import Segment, Segmented, from_model

__all__ = ["Executed", "HostExecutor", "MaskedExecutor", "Segment", "Segmented", "from_model"]
