"""Errors of every layer on noised test images, by time: what the claims on layers and probes ask for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.diffusion.certainty import certainty_target, squared_errors
from dyncomp.models import ExitingDenoiser


@functools.partial(jax.jit, static_argnums=0)
def _errors(net, params, images, times, noise):
    noised = net.schedule.noised(images, noise, times)
    inner, certainty = net.apply({"params": params}, noised, times, method="denoise")
    target = certainty_target(inner, noise)
    each = lambda values: jnp.mean(values, axis=(2, 3, 4))
    moments = [certainty, target, certainty**2, target**2, certainty * target]
    pixels = jnp.stack([jnp.mean(values) for values in moments])
    return squared_errors(inner, noise), each(certainty), each(target), pixels


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of all layers on all draws [x n]; ``times`` [n]; the correlation pixel by pixel."""

    squared: np.ndarray
    certainty: np.ndarray
    target: np.ndarray
    times: np.ndarray
    r_pixel: float


def errors_of(net: ExitingDenoiser, params: Any, images: np.ndarray, seed: int, draws: int):
    """Every layer's errors on test images at evenly spread times."""
    rng = np.random.default_rng([seed, 5])
    chosen = images[rng.integers(len(images), size=draws)]
    times = rng.permutation((np.arange(draws, dtype=np.float32) + 0.5) / draws)
    noise = rng.normal(size=chosen.shape).astype(np.float32)
    parts = [
        jax.device_get(_errors(net, params, *(a[i : i + 256] for a in (chosen, times, noise))))
        for i in range(0, draws, 256)
    ]
    squared, certainty, target = (np.concatenate([p[i] for p in parts], axis=1) for i in range(3))
    a, b, aa, bb, ab = np.mean([p[3] for p in parts], axis=0, dtype=np.float64)
    r_pixel = (ab - a * b) / np.sqrt((aa - a * a) * (bb - b * b))
    return Errors(squared, certainty, target, times, float(r_pixel))


def layer_figures(found: Errors, plain: Errors) -> dict[str, float]:
    """What the claims ask of the fine-tuned network's layers."""
    mean, clean, noisy = (found.squared[:, at].mean(1) for at in (slice(None), *_ends(found)))
    other = plain.squared.mean(1)
    within = [np.corrcoef(*pair)[0, 1] for pair in zip(found.certainty, found.target, strict=True)]
    return {
        **{f"mse_{i + 1}": value for i, value in enumerate(mean)},
        **{f"plain_mse_{i + 1}": value for i, value in enumerate(other)},
        "excess_from_4": (mean[3:] / mean[-1]).max() - 1.0,
        "gain": mean[0] - mean[-1],
        "gain_clean": clean[0] - clean[-1],
        "gain_noisy": noisy[0] - noisy[-1],
        "gain_clean_minus_noisy": (clean[0] - clean[-1]) - (noisy[0] - noisy[-1]),
        "r_map": np.corrcoef(found.certainty.ravel(), found.target.ravel())[0, 1],
        "r_map_within": min(within),
        "r_pixel": found.r_pixel,
        "plain_over_ual": other[:-1].mean() / mean[:-1].mean(),
        "final_over_plain": mean[-1] / other[-1] - 1.0,
    }


def _ends(found: Errors) -> tuple[np.ndarray, np.ndarray]:
    """t < 100 and t >= 700."""
    return found.times < 0.1, found.times >= 0.7


def depths_by_time(found: Errors, tau: float) -> dict[str, float]:
    """Mean layers run on the draws at a threshold."""
    crossed = np.concatenate([found.certainty[:-1] > tau, np.ones((1, len(found.times)), bool)])
    depth = crossed.argmax(axis=0) + 1.0
    clean, noisy = (depth[at].mean() for at in _ends(found))
    return {
        "depth_clean": clean,
        "depth_noisy": noisy,
        "depth_noisy_minus_clean": noisy - clean,
    }
