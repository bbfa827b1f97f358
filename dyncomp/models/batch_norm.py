"""Batch normalisation whose running statistics are controls."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float


class BatchNorm(nn.Module):
    """Normalises every channel by the statistics of the batch, in evaluation by running ones (Ioffe and Szegedy 2015).

    Running statistics are the controls ``mean`` [d] and ``var`` [d]: the train step applies a model with its controls
    mutable and keeps what comes back. They move in training only, by ``momentum`` towards the batch's mean and
    unbiased variance (the convention of PyTorch). All rows of a batch count, whatever an exit decides about them;
    under a mesh the batch is the global one. Statistics are float32, the result is ``x.dtype``.

    Attributes:
      momentum: weight of the newest batch.
    """

    momentum: float = 0.1
    eps: float = 1e-5
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"], train: bool = False) -> Float[Array, "*n d"]:
        """Normalises over all axes but the last."""
        d, dtype = x.shape[-1], self.dtypes.param
        scale = param(self, "scale", nn.initializers.ones_init(), (d,), ("embed",), dtype)
        bias = param(self, "bias", nn.initializers.zeros_init(), (d,), ("embed",), dtype)
        mean = self.variable("controls", "mean", lambda: jnp.zeros((d,), jnp.float32))
        var = self.variable("controls", "var", lambda: jnp.ones((d,), jnp.float32))
        wide = x.astype(jnp.float32).reshape(-1, d)
        if train:
            centre = jnp.mean(wide, axis=0)
            away = wide - centre[None]
            spread = jnp.mean(away * away, axis=0)
            if self.is_mutable_collection("controls") and not self.is_initializing():
                unbiased = spread * (wide.shape[0] / max(wide.shape[0] - 1, 1))
                mean.value = self._moved(mean.value, centre)
                var.value = self._moved(var.value, unbiased)
        else:
            centre, spread = jnp.asarray(mean.value), jnp.asarray(var.value)
        gain = scale.astype(jnp.float32) * lax.rsqrt(spread + jnp.float32(self.eps))
        y = (wide - centre[None]) * gain[None] + bias.astype(jnp.float32)[None]
        return y.astype(x.dtype).reshape(x.shape)

    def _moved(self, old: Array, new: Array) -> Array:
        return jnp.asarray(old) + jnp.float32(self.momentum) * lax.stop_gradient(new - old)
