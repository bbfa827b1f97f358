"""Noise schedules in continuous time: x_t = sqrt(abar(t)) x_0 + sqrt(1 - abar(t)) eps, t in [0, 1].

Networks see the time multiplied by `TIME_SCALE`, as the usual tables of 1000 steps number it.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float

Kind = Literal["linear", "scaled_linear", "cosine"]

TIME_SCALE = 1000.0

LINEAR = (0.1, 20.0)
"""beta at 0 and 1 of the variance-preserving SDE (Song et al. 2021); /1000, the linear table of DDPM."""

SCALED = (math.sqrt(0.85), math.sqrt(12.0))
"""sqrt(beta) at 0 and 1: the limit of Stable Diffusion's table, sqrt(0.00085) to sqrt(0.012)."""

COSINE, COSINE_END = 0.008, 0.9946
"""Offset of the cosine schedule (Nichol and Dhariwal 2021), and where time stops: abar would be 0 at 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """How much of an image is left at a time.

    Attributes:
      kind: "linear" (in beta), "scaled_linear" (in sqrt(beta)) or "cosine" (abar = cos^2).
    """

    kind: Kind = "linear"

    def __post_init__(self):
        if self.kind not in ("linear", "scaled_linear", "cosine"):
            raise DyncompError(
                f"NoiseSchedule.kind={self.kind!r}: use 'linear', 'scaled_linear' or 'cosine'"
            )

    def log_signal(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """ln abar(t), float32; 0 at t = 0."""
        if self.kind == "linear":
            low, high = LINEAR
            return -(low * t + 0.5 * (high - low) * t * t)
        if self.kind == "scaled_linear":
            low, high = SCALED
            root = low + (high - low) * t
            return -(root * root * root - low**3) / (3.0 * (high - low))
        return 2.0 * (jnp.log(jnp.cos(_angle(t))) - math.log(math.cos(_START)))

    def beta(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """-d ln abar / dt: the rate of the forward SDE dx = -beta x / 2 dt + sqrt(beta) dW."""
        if self.kind == "linear":
            low, high = LINEAR
            return low + (high - low) * t
        if self.kind == "scaled_linear":
            low, high = SCALED
            root = low + (high - low) * t
            return root * root
        return math.pi / (1.0 + COSINE) * jnp.tan(_angle(t))

    def scales(self, t: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """(sqrt(abar), sqrt(1 - abar)): the factors of image and noise."""
        log = self.log_signal(t)
        return jnp.exp(0.5 * log), jnp.sqrt(-jnp.expm1(log))

    def noised(
        self, x: Float[Array, "b *s"], noise: Float[Array, "b *s"], t: Float[Array, "b"]
    ) -> Float[Array, "b *s"]:
        """x_t of images, each at a time of its own."""
        signal, left = (like(scale, x) for scale in self.scales(t))
        return signal * x + left * noise


_START = COSINE / (1.0 + COSINE) * math.pi / 2


def _angle(t: Array) -> Array:
    return (jnp.minimum(t, COSINE_END) + COSINE) / (1.0 + COSINE) * (math.pi / 2)


def like(each: Float[Array, "b"], x: Float[Array, "b *s"]) -> Array:
    """One number an example, shaped to multiply ``x``."""
    return each.reshape(-1, *[1] * (x.ndim - 1))


def time_embedding(t: Float[Array, "b"], width: int) -> Float[Array, "b d"]:
    """cos and sin of `TIME_SCALE` t at width / 2 frequencies from 1 down to 1/10,000 (Vaswani et al. 2017).

    Raises:
      DyncompError: the width is odd.
    """
    if width % 2:
        raise DyncompError(f"time_embedding: a width of {width}; use an even one")
    half = width // 2
    rates = jnp.exp(-math.log(10_000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = TIME_SCALE * t.astype(jnp.float32)[:, None] * rates[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
