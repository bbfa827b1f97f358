"""Banks of experts for Hopper GPUs (H100, H200), asked for by name: a CUDA platform does not tell its GPUs."""

from typing import ClassVar

from flax import struct

from dyncomp.experts.bank import MLPBank, SwiGLUBank
from dyncomp_kernels.grouped_matmul.api import Implementation


@struct.dataclass
class HopperSwiGLUBank(SwiGLUBank):
    """`SwiGLUBank` by the "mosaic_gpu" form of `grouped_matmul`, for H100 and H200; the same parameters.

    It refuses other dtypes than bfloat16 and sizes that are no multiples of 128. Elsewhere than on CUDA the portable
    form serves; CUDA before Hopper fails to compile.
    """

    matmul: ClassVar[Implementation | None] = "mosaic_gpu"


@struct.dataclass
class HopperMLPBank(MLPBank):
    """`MLPBank` as `HopperSwiGLUBank` is `SwiGLUBank`."""

    matmul: ClassVar[Implementation | None] = "mosaic_gpu"
