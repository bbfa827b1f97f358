"""Samplers: from noise to images by a denoising function that says what of x_t is noise.

A sampler knows its times and one step; who computes the noise does not matter to it. So the same sampler runs inside
one compiled program (`sample_scanned`) and around a host-driven executor (`sample`), and a batch gives every image what
it would be alone: noise is drawn from a key of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Key
from dyncomp.diffusion.schedules import NoiseSchedule

Denoise: TypeAlias = Callable[[Any, Any, Any], tuple[Any, Any]]
"""``(x [b ...], times [b], index) -> (noise [b ...], extra)``: index counts the steps; extras are handed back."""


@runtime_checkable
class Sampler(Protocol):
    """What a sampler offers; hashable."""

    def times(self) -> np.ndarray:
        """float32 [s + 1], falling; the network is asked at the first s."""
        ...

    def step(self, x: Any, noise: Any, index: Any, keys: Any) -> Any:
        """x [b ...] at time ``index + 1`` from x at time ``index`` and the noise in it; keys [b] where it draws."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12).

    Attributes:
      schedule: of the noise.
      steps: evenly spaced from 1 to 0.
      eta: 0 is deterministic; 1 draws as much noise as ancestral sampling.
      clip: the estimate of x_0 is held in [-clip, clip]; 0 for not at all.
    """

    schedule: NoiseSchedule = NoiseSchedule()
    steps: int = 50
    eta: float = 0.0
    clip: float = 0.0

    def __post_init__(self):
        _check_steps("DDIM", self.steps)
        if self.eta < 0 or self.clip < 0:
            raise DyncompError(f"DDIM: eta={self.eta}, clip={self.clip}; use 0 or more")

    def times(self) -> np.ndarray:
        """float32 [s + 1] from 1 to 0."""
        return np.linspace(1.0, 0.0, self.steps + 1, dtype=np.float32)

    def step(
        self,
        x: Float[Array, "b *s"],
        noise: Float[Array, "b *s"],
        index: Int[Array, ""] | int,
        keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b *s"]:
        """The next x."""
        times = jnp.asarray(self.times())
        signal, left = self.schedule.scales(times[index])
        next_signal, next_left = self.schedule.scales(times[index + 1])
        clean = (x - left * noise) / signal
        if self.clip:
            clean = jnp.clip(clean, -self.clip, self.clip)
            noise = (x - signal * clean) / left
        if not self.eta:
            return next_signal * clean + next_left * noise
        ratio = 1.0 - jnp.square(signal / next_signal)
        fresh = self.eta * next_left / left * jnp.sqrt(ratio)
        kept = jnp.sqrt(jnp.maximum(jnp.square(next_left) - jnp.square(fresh), 0.0))
        return next_signal * clean + kept * noise + fresh * drawn(keys, index, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama:
    """Euler steps along the reverse SDE (Song et al. 2021): x + (beta x / 2 - beta eps / sigma) dt + sqrt(beta dt) z.

    Evenly spaced from 1 to ``last``, then one step to 0 that draws nothing.

    Attributes:
      schedule: of the noise.
      steps: of all.
      last: the last time the network is asked at.
    """

    schedule: NoiseSchedule = NoiseSchedule()
    steps: int = 1000
    last: float = 1e-3

    def __post_init__(self):
        _check_steps("EulerMaruyama", self.steps)
        if not 0 < self.last < 1:
            raise DyncompError(f"EulerMaruyama.last={self.last}: use a time between 0 and 1")

    def times(self) -> np.ndarray:
        """float32 [s + 1] from 1 to ``last``, and 0."""
        grid = np.linspace(1.0, self.last, self.steps, dtype=np.float32)
        return np.append(grid, np.float32(0.0))

    def step(
        self,
        x: Float[Array, "b *s"],
        noise: Float[Array, "b *s"],
        index: Int[Array, ""] | int,
        keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b *s"]:
        """The next x."""
        times = jnp.asarray(self.times())
        span = times[index] - times[index + 1]
        beta = self.schedule.beta(times[index])
        _, left = self.schedule.scales(times[index])
        mean = x + (0.5 * beta * x - beta / left * noise) * span
        draws = jnp.asarray(index + 1 < self.steps, x.dtype)
        return mean + draws * jnp.sqrt(beta * span) * drawn(keys, index, x)


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise DyncompError(f"{name}.steps={steps}: use 1 or more")


def drawn(
    keys: Key[Array, "b"] | None, index: Any, x: Float[Array, "b *s"]
) -> Float[Array, "b *s"]:
    """Noise of step ``index`` for every example, from its own key.

    Raises:
      DyncompError: no keys.
    """
    if keys is None:
        raise DyncompError("this sampler draws noise: give keys, one an example")
    one = lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:], x.dtype)
    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnums=0)
def _advance(sampler: Sampler, x: Any, noise: Any, index: Any, keys: Any) -> Any:
    return sampler.step(x, noise, index, keys)


def sample(
    sampler: Sampler, denoise: Denoise, x: Any, keys: Key[Array, "b"] | None = None
) -> tuple[Any, list[Any]]:
    """Runs a sampler from the host, so that ``denoise`` may be an executor.

    Args:
      sampler: how.
      denoise: gets ``index`` as an int.
      x: noise [b ...].
      keys: one an example, where the sampler draws.

    Returns:
      (images, the extras of every step).
    """
    extras = []
    for index, time in enumerate(sampler.times()[:-1]):
        noise, extra = denoise(x, np.full(x.shape[:1], time, np.float32), index)
        x = _advance(sampler, jnp.asarray(x), jnp.asarray(noise), np.int32(index), keys)
        extras.append(extra)
    return x, extras


def sample_scanned(
    sampler: Sampler, denoise: Denoise, x: Float[Array, "b *s"], keys: Any = None
) -> tuple[Float[Array, "b *s"], Any]:
    """The same as one scan, to be compiled; ``denoise`` gets ``index`` traced, and extras come back stacked."""
    times = jnp.asarray(sampler.times())

    def body(x: Array, index: Array) -> tuple[Array, Any]:
        at = jnp.broadcast_to(times[index], x.shape[:1])
        noise, extra = denoise(x, at, index)
        return sampler.step(x, noise, index, keys), extra

    return jax.lax.scan(body, x, jnp.arange(len(times) - 1))
