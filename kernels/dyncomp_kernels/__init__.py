"""Hot operations of conditional computation, free of Flax.

Each folder holds one operation: its public function and forms, a reference that defines it, its price, named cases,
tests and a benchmark.
"""

from dyncomp_kernels.grouped_matmul.api import explain, grouped_matmul
from dyncomp_kernels.grouped_swiglu.api import grouped_swiglu
from dyncomp_kernels.sparse_attention.api import merged, sparse_attention
from dyncomp_kernels.sparse_attention.columns import column_attention
from dyncomp_kernels.sparse_attention.lists import BlockLists

__all__ = [
    "BlockLists",
    "column_attention",
    "explain",
    "grouped_matmul",
    "grouped_swiglu",
    "merged",
    "sparse_attention",
]
