"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Llama."""

import contextlib
import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.dtypes import widened
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int

ScalingKind = Literal["linear", "llama3", "yarn"]

KNOWN = 2**18
"""Most numbers of an array, known while tracing, of which constants of the program are made."""


def _at_once(x: Any) -> contextlib.AbstractContextManager[Any]:
    """Computes while tracing what depends on ``x`` alone, where that is known and small.

    XLA's CPU compiler takes sines and cosines that are no constants anew for every example and head.
    """
    traced = isinstance(x, jax.core.Tracer) or x.size > KNOWN
    return contextlib.nullcontext() if traced else jax.ensure_compile_time_eval()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies change so that a model reads longer texts than it was trained on first.

    "linear" divides all by ``factor`` (position interpolation, arXiv 2306.15595). "llama3" divides those whose
    wavelength is long against ``original_length`` and leaves the short ones (Llama 3.1). "yarn" blends by the number of
    turns within ``original_length`` and makes attention sharper (arXiv 2309.00071).

    Attributes:
      kind: which of the three.
      factor: at least 1.
      original_length: positions seen in training ("llama3", "yarn").
      low_freq_factor, high_freq_factor: turns within ``original_length`` between which "llama3" blends.
      beta_fast, beta_slow: turns between which "yarn" blends.
      truncate: "yarn" rounds the ends of its ramp to whole frequencies.
      attention_factor: "yarn" multiplies rotated queries and keys by it; None for 0.1 ln(factor) + 1.
    """

    kind: ScalingKind = "linear"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise DyncompError(f"RopeScaling.kind={self.kind!r}: use 'linear', 'llama3' or 'yarn'")
        if not self.factor >= 1:
            raise DyncompError(f"RopeScaling.factor={self.factor}: use 1 or more")
        if self.kind != "linear" and self.original_length < 1:
            raise DyncompError(
                f"RopeScaling: {self.kind!r} needs original_length, the positions seen in training"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise DyncompError(
                f"RopeScaling: need 0 < low_freq_factor={self.low_freq_factor} <"
                f" high_freq_factor={self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
            raise DyncompError(
                f"RopeScaling: need 0 < beta_slow={self.beta_slow} < beta_fast={self.beta_fast}"
            )

    @property
    def amplitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0

    def divisors(self, head_dim: int, theta: float) -> np.ndarray:
        """What each of the p/2 frequencies is divided by, float64 [q]."""
        if self.kind == "linear":
            return np.full(head_dim // 2, self.factor)
        places = np.arange(head_dim // 2)
        if self.kind == "llama3":
            turns = self.original_length / (2 * math.pi * theta ** (2 * places / head_dim))
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0, 1)
        else:
            low, high = self._ramp(head_dim, theta)
            kept = 1 - np.clip((places - low) / (high - low), 0, 1)
        return 1 / (kept + (1 - kept) / self.factor)

    def _ramp(self, head_dim: int, theta: float) -> tuple[float, float]:
        """The frequencies (by index) at which "yarn" starts and ends to interpolate."""
        place = lambda turns: (
            head_dim
            * math.log(self.original_length / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )
        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(float(low), 0.0), min(float(high), head_dim - 1.0)
        return low, high if high != low else high + 0.001


def rope_angles(
    positions: Int[Array, "*n"],
    head_dim: int,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
) -> Float[Array, "*n q"]:
    """Rotation angles ``position * theta^(-2i/p)`` of the p/2 pairs of a head, float32, radians.

    Raises:
      DyncompError: ``head_dim`` is odd.
    """
    if head_dim % 2:
        raise DyncompError(
            f"RoPE rotates pairs: head_dim={head_dim} is odd; choose an even head_dim"
        )
    with _at_once(positions):
        exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / jnp.float32(head_dim)
        frequency = jnp.float32(theta) ** -exponent
        if scaling is not None:
            frequency = frequency / jnp.asarray(scaling.divisors(head_dim, theta), jnp.float32)
        return jnp.expand_dims(positions.astype(jnp.float32), -1) * jnp.expand_dims(
            frequency, tuple(range(positions.ndim))
        )


def rotate(
    x: Float[Array, "b t h p"], angles: Float[Array, "#b t q"], amplitude: float = 1.0
) -> Float[Array, "b t h p"]:
    """Rotates element i with i + p/2 of each head by ``angles``; float32 or more inside, returns ``x.dtype``."""
    with _at_once(angles):
        cos, sin = jnp.cos(angles), jnp.sin(angles)
    return _turned(x, cos, sin, amplitude)


def rotate_below(
    x: Float[Array, "b n h p"],
    positions: Int[Array, "#b n"],
    most: int,
    theta: float = 10_000.0,
    scaling: RopeScaling | None = None,
) -> Float[Array, "b n h p"]:
    """`rotate` by the angles of positions in [0, ``most``), whose sines and cosines are constants of the program.

    For many keys that are turned in every step.
    """
    with jax.ensure_compile_time_eval():
        angles = rope_angles(jnp.arange(most), x.shape[-1], theta, scaling)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
    amplitude = 1.0 if scaling is None else scaling.amplitude
    own = lambda table: jnp.take(table, positions, axis=0, mode="clip")
    return _turned(x, own(cos), own(sin), amplitude)


def _turned(x: Array, cos: Array, sin: Array, amplitude: float) -> Array:
    first, second = jnp.split(widened(x), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    if amplitude != 1.0:
        cos, sin = cos * jnp.float32(amplitude), sin * jnp.float32(amplitude)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
