"""Spiking neurons: membranes that add up a current, fire at a threshold and are reset; a call is a step of time.

A spike carries the threshold as its amplitude, so what neurons hand on is in the unit of the activations that they
stand for. Firing has derivative zero almost everywhere; a surrogate takes its place where networks are trained
through time (Wu et al. 2018; Neftci et al. 2019).
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float

Surrogate = Literal["triangle", "arctan"]
Reset = Literal["soft", "hard"]


def slope(u: Float[Array, "*n"], surrogate: Surrogate, width: float) -> Float[Array, "*n"]:
    """What stands for the derivative of a step at 0; it integrates to 1.

    ``triangle``: max(0, 1 - |u| / width) / width (Esser et al. 2016). ``arctan``: 1 / (width (1 + (pi u / width)^2)),
    the derivative of arctan(pi u / width) / pi (Fang et al. 2021, alpha = 2 / width).
    """
    if surrogate == "triangle":
        return jnp.maximum(0.0, 1.0 - jnp.abs(u) / width) / width
    return 1.0 / (width * (1.0 + jnp.square(math.pi * u / width)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def fires(
    u: Float[Array, "*n"], surrogate: Surrogate = "triangle", width: float = 1.0
) -> Float[Array, "*n"]:
    """1 where u >= 0, else 0; differentiated as if its derivative were `slope`."""
    return (u >= 0).astype(u.dtype)


@fires.defjvp
def _fires_jvp(surrogate, width, primals, tangents):
    (u,), (du,) = primals, tangents
    return fires(u, surrogate, width), slope(u, surrogate, width) * du


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neuron:
    """V <- leak V + I; o = theta where V >= theta, else 0; V is reset by what was fired. No spike is negative.

    Without leak, with soft reset and start 1/2, a constant current x fires clip(floor(T x / theta + 1/2), 0, T) times
    in T steps: with T = 2^b - 1 a quantiser of b bits that rounds to nearest (halves up), which is what lets a network
    of `learned_step` activations be converted (the released code of arXiv 2303.10276).

    Attributes:
      leak: share of the membrane that stays from step to step; 1 for none lost.
      reset: ``soft`` takes theta away, so that what was above it is kept; ``hard`` goes to 0.
      start: membrane before the first step, in thresholds.
      surrogate: see `slope`; of u = (V - theta) / theta.
      width: of the surrogate, in thresholds.
    """

    leak: float = 1.0
    reset: Reset = "soft"
    start: float = 0.5
    surrogate: Surrogate = "triangle"
    width: float = 1.0

    def __post_init__(self):
        if self.reset not in ("soft", "hard"):
            raise DyncompError(f"Neuron.reset={self.reset!r}: use 'soft' or 'hard'")
        if self.surrogate not in ("triangle", "arctan"):
            raise DyncompError(f"Neuron.surrogate={self.surrogate!r}: use 'triangle' or 'arctan'")
        if not 0.0 < self.leak <= 1.0 or self.width <= 0.0:
            raise DyncompError(
                f"Neuron: leak={self.leak}, width={self.width}; use 0 < leak <= 1 and width > 0"
            )

    @property
    def flops(self) -> int:
        """A neuron and step: current, comparison, amplitude, reset, and the leak where there is one."""
        return 4 if self.leak == 1.0 else 5

    def begin(self, shape: tuple[int, ...], theta: Float[Array, ""]) -> Float[Array, "*n"]:
        """The membranes before the first step, of theta's dtype."""
        return jnp.full(shape, self.start * theta)

    def step(
        self, v: Float[Array, "*n"], current: Float[Array, "*n"], theta: Float[Array, ""]
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
        """(membranes after the reset, what is fired: theta or 0)."""
        v = (v if self.leak == 1.0 else self.leak * v) + current
        # The sign of a difference is exact, so this is V >= theta whatever theta divides it by.
        fired = fires((v - theta) / theta, self.surrogate, self.width)
        out = theta * fired
        return (v - out if self.reset == "soft" else v * (1.0 - fired)), out

    def run(self, currents: Float[Array, "t *n"], theta: Float[Array, ""]) -> Float[Array, "t *n"]:
        """What is fired at every step of a given sequence of currents."""
        step = lambda v, current: self.step(v, current, theta)
        return lax.scan(step, self.begin(currents.shape[1:], theta), currents, unroll=8)[1]
