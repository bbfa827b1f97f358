"""The one dtype policy (DESIGN invariant 9)."""

import dataclasses
from typing import Any, Literal, TypeVar

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp_kernels._widths import sum_dtype

Values = TypeVar("Values", bound=Any)

FloatName = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTypes:
    """Names of the dtypes of parameters, compute and accumulation.

    Routers, norms, softmax and losses are float32 (``accum``) whatever ``compute`` says; float64 where that is float64
    (`widened`), so that a run in float64 (``jax_enable_x64``) is one throughout.
    """

    param: FloatName = "float32"
    compute: FloatName = "float32"
    accum: FloatName = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value not in ("float32", "bfloat16", "float16", "float64"):
                raise DyncompError(f"DTypes.{field.name}={value!r}: use 'float32' or 'bfloat16'")

    @property
    def compute_itemsize(self) -> int:
        """Bytes of one activation."""
        return jnp.dtype(self.compute).itemsize

    @property
    def param_itemsize(self) -> int:
        """Bytes of one parameter."""
        return jnp.dtype(self.param).itemsize


def widened(x: Values) -> Values:
    """``x`` in float32, or as it is where it is float64: what routers, norms, softmax and losses compute in."""
    return x.astype(sum_dtype(x.dtype))
