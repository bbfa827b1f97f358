"""Hot operations of conditional computation, free of Flax.

Each folder holds one operation: its public function and forms, a reference that defines it, its price, named cases,
tests and a benchmark.
"""

from dyncomp_kernels.grouped_matmul.api import explain, grouped_matmul
from dyncomp_kernels.grouped_swiglu.api import grouped_swiglu

__all__ = ["explain", "grouped_matmul", "grouped_swiglu"]
