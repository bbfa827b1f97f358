"""What rates the experts for a row: linear or cosine scores, and what a layer adds from the one below."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import widened
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

SMALL = nn.initializers.normal(0.02)


def linear(module: nn.Module, x: Float[Array, "n d"], num_experts: int) -> Float[Array, "n e"]:
    """Logits x W without bias, float32 or more; the parameter ``kernel`` [d e] belongs to ``module``."""
    x = widened(x)
    shape, axes = (x.shape[-1], num_experts), ("embed", "router")
    return jnp.dot(x, widened(param(module, "kernel", SMALL, shape, axes, x.dtype.name)))


def cosine(
    module: nn.Module, x: Float[Array, "n d"], num_experts: int, width: int = 256
) -> Float[Array, "n e"]:
    """exp(min(t, log 100)) times the cosine of a projected row and an expert's embedding (Tutel, arXiv 2206.03382).

    Parameters of ``module``: ``projection`` [d w] with ``bias`` [w], ``embedding`` [w e] drawn from N(0, 0.01), and the
    log-temperature ``temperature``, log(1/0.5) at first. Without the bias the logits do not depend on the length of x.
    """
    lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
    x = widened(x)
    own = functools.partial(param, module, dtype=x.dtype.name)
    projection = own("projection", lecun, (x.shape[-1], width), ("embed", "router"))
    bias = own("bias", zeros, (width,), ("router",))
    small = nn.initializers.normal(0.01)
    embedding = own("embedding", small, (width, num_experts), ("router", "router"))
    start = nn.initializers.constant(math.log(1 / 0.5))
    temperature = own("temperature", start, (1,), ("router",))
    rows = _unit(jnp.dot(x, projection) + bias[None], -1)
    scale = jnp.exp(jnp.minimum(temperature, math.log(100.0)))
    return scale[None] * jnp.dot(rows, _unit(embedding, 0))


def _unit(v: Array, axis: int) -> Array:
    return v * jax.lax.rsqrt(jnp.sum(jnp.square(v), axis, keepdims=True) + 1e-12)


class GatingResidual(nn.Module):
    """Adds G W_g, G being the logits of the layer below (MoE++, arXiv 2410.07348, eq. 6: the pathway-aware router).

    What a layer hands on are its whole logits, this term included: a recurrence over depth. Float32 or more, no bias.
    W_g is drawn small; the first layer sees G = 0.
    """

    num_experts: int

    @nn.compact
    def __call__(
        self, logits: Float[Array, "n e"], below: Float[Array, "n e"]
    ) -> Float[Array, "n e"]:
        """Logits of this layer, to route with and to hand on."""
        shape = (self.num_experts, self.num_experts)
        below = widened(below)
        kernel = param(self, "kernel", SMALL, shape, ("router", "router"), below.dtype.name)
        return logits + jnp.dot(below, widened(kernel))
