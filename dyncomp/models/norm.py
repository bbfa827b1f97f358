"""The norm of a block as a module: a scale (and bias) around the pure functions of `core.norms`."""

from typing import Literal

from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.norms import layer_norm, rms_norm
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

NormKind = Literal["rms", "layer"]


class Norm(nn.Module):
    """RMS norm or layer norm over the last axis; statistics in float32, result in ``x.dtype``."""

    kind: NormKind = "rms"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.kind not in ("rms", "layer"):
            raise DyncompError(f"norm={self.kind!r}: use 'rms' or 'layer'")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """Normalises each row."""
        shape, dtype = (x.shape[-1],), self.dtypes.param
        scale = param(self, "scale", nn.initializers.ones_init(), shape, ("embed",), dtype)
        if self.kind == "rms":
            return rms_norm(x, scale, eps=self.eps)
        bias = param(self, "bias", nn.initializers.zeros_init(), shape, ("embed",), dtype)
        return layer_norm(x, scale, bias, eps=self.eps)
