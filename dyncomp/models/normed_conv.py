"""A convolution with batch norm that folds into one convolution with a bias."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float


def conv(
    x: Float[Array, "b _ _ _"], kernel: Float[Array, "_ _ _ o"], stride: int
) -> Float[Array, "b _ _ o"]:
    """A convolution with a kernel of odd side k and (k - 1) / 2 zeros around the image; sides divide rounding up."""
    around = [(side // 2, side // 2) for side in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), around,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


class NormedConv(nn.Module):
    """conv, then batch norm (Ioffe and Szegedy 2015); running statistics are controls, moved by training.

    Attributes:
      inner, width: channels of input and output.
      side: of the kernel, odd.
      stride: of the convolution.
      momentum: share of the old running statistics that stays a step.
    """

    inner: int
    width: int
    side: int = 3
    stride: int = 1
    momentum: float = 0.9
    eps: float = 1e-5
    dtypes: DTypes = DTypes()

    def setup(self):  # noqa: D102
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
        he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        shape, axes = (self.side, self.side, self.inner, self.width), (None, None, None, "embed")
        self.kernel = param(self, "kernel", he, shape, axes, self.dtypes.param)
        self.gain = param(self, "gain", ones, (self.width,), ("embed",))
        self.shift = param(self, "shift", zeros, (self.width,), ("embed",))
        self.mean = self.variable("controls", "mean", jnp.zeros, (self.width,), jnp.float32)
        self.var = self.variable("controls", "var", jnp.ones, (self.width,), jnp.float32)

    def __call__(
        self, x: Float[Array, "n _ _ i"], mask: Float[Array, "n"] | None = None
    ) -> Float[Array, "n _ _ o"]:
        """Training: normalised by the statistics of this batch (of its real examples), which move the running ones."""
        y = conv(x, self.kernel, self.stride)
        wide = y.astype(jnp.float32)
        real = jnp.ones((x.shape[0],), jnp.float32) if mask is None else mask.astype(jnp.float32)
        weight = real / jnp.maximum(jnp.sum(real) * (y.shape[1] * y.shape[2]), 1.0)
        mean = jnp.einsum("nhwo,n->o", wide, weight)
        var = jnp.einsum("nhwo,n->o", jnp.square(wide - mean[None, None, None]), weight)
        if self.is_mutable_collection("controls") and not self.is_initializing():
            keep = self.momentum
            self.mean.value = keep * self.mean.value + (1.0 - keep) * lax.stop_gradient(mean)
            self.var.value = keep * self.var.value + (1.0 - keep) * lax.stop_gradient(var)
        scale = self.gain * lax.rsqrt(var + self.eps)
        out = wide * scale[None, None, None] + (self.shift - mean * scale)[None, None, None]
        return out.astype(x.dtype)

    def folded(self) -> tuple[Float[Array, "_ _ i o"], Float[Array, "o"]]:
        """(kernel, bias) of the one convolution that this is under its running statistics."""
        scale = self.gain * lax.rsqrt(self.var.value + self.eps)
        kernel = self.kernel.astype(jnp.float32) * scale[None, None, None]
        return kernel.astype(self.dtypes.compute), self.shift - self.mean.value * scale
