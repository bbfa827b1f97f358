"""The one dtype policy (DESIGN invariant 9)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError

FloatName = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTypes:
    """Names of the dtypes of parameters, compute and accumulation.

    Routers, norms, softmax and losses are float32 (``accum``) whatever ``compute`` says.
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
