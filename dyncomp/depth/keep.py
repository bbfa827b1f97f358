"""Which layers run: static sets of layer indices, chosen once for a deployment.

A set is a sorted tuple of ints, hashable, so that a program is compiled for it. Unified layer skipping (arXiv
2404.06954) runs every generated token through the same evenly spaced set; the others are its baselines at equal size.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from dyncomp.core.errors import DyncompError

Layers: TypeAlias = tuple[int, ...]
Spacing = Literal["even", "spread", "bottom", "top", "random"]


def layer_count(n_layers: int, speedup: int | float) -> int:
    """floor(N / s): how many layers a target speed-up leaves.

    The speed-up that is reached is smaller: the head, the embedding and the full-depth prompt stay.

    Raises:
      DyncompError: it leaves fewer than 2 layers or is below 1.
    """
    if speedup < 1:
        raise DyncompError(f"speedup={speedup}: use a number >= 1")
    return _check_count(int(n_layers // speedup), n_layers)


def evenly(n_layers: int, speedup: int | float) -> Layers:
    """The published rule (arXiv 2404.06954 and its code): first and last layer, and multiples of an interval.

    n = floor(N / s) layers stay; interval = floor(N / (n - 1)); i = 1..N-2 in order stays where it is a multiple of the
    interval, until there are n. The last gap may be larger than the others. s = 1 keeps all.
    """
    keep = layer_count(n_layers, speedup)
    interval = n_layers // (keep - 1)
    inner = [i for i in range(1, n_layers - 1) if i % interval == 0]
    return (0, *inner[: keep - 2], n_layers - 1)


def spread(n_layers: int, keep: int) -> Layers:
    """``keep`` layers from first to last, each at the rounded (half up) place of an equal spacing."""
    gaps = _check_count(keep, n_layers) - 1
    return tuple((2 * i * (n_layers - 1) + gaps) // (2 * gaps) for i in range(keep))


def bottom(n_layers: int, keep: int) -> Layers:
    """The first ``keep`` layers: an early exit for everyone."""
    return tuple(range(_check_count(keep, n_layers)))


def top(n_layers: int, keep: int) -> Layers:
    """Layer 0 and the last ``keep`` - 1 layers (as SkipDecode, arXiv 2307.02628, keeps its upper layers)."""
    _check_count(keep, n_layers)
    return (0, *range(n_layers - keep + 1, n_layers))


def random_layers(n_layers: int, keep: int, seed: int) -> Layers:
    """A control: ``keep`` layers drawn uniformly, any of them."""
    _check_count(keep, n_layers)
    drawn = np.random.default_rng(seed).choice(n_layers, keep, replace=False)
    return tuple(sorted(int(layer) for layer in drawn))


def layer_set(spacing: Spacing, n_layers: int, speedup: int | float, *, seed: int = 0) -> Layers:
    """floor(N / s) layers by any of the rules; ``seed`` matters to ``random`` only.

    Raises:
      DyncompError: unknown ``spacing``, or a speed-up that leaves fewer than 2 layers.
    """
    keep = layer_count(n_layers, speedup)
    if spacing == "even":
        return evenly(n_layers, speedup)
    if spacing == "random":
        return random_layers(n_layers, keep, seed)
    rules = {"spread": spread, "bottom": bottom, "top": top}
    if spacing not in rules:
        raise DyncompError(
            f"spacing={spacing!r}: use 'even', 'spread', 'bottom', 'top' or 'random'"
        )
    return rules[spacing](n_layers, keep)


def check_layers(layers: Sequence[int], n_layers: int) -> Layers:
    """The set as a tuple.

    Raises:
      DyncompError: not strictly increasing, outside 0..N-1, or fewer than 2 layers.
    """
    layers = tuple(int(layer) for layer in layers)
    _check_count(len(layers), n_layers)
    if any(a >= b for a, b in zip(layers[:-1], layers[1:], strict=True)):
        raise DyncompError(f"layers={layers}: give each layer once, in order")
    if layers[0] < 0 or layers[-1] >= n_layers:
        raise DyncompError(f"layers={layers}: there are layers 0..{n_layers - 1}")
    return layers


def _check_count(keep: int, n_layers: int) -> int:
    if not 2 <= keep <= n_layers:
        raise DyncompError(f"{keep} of {n_layers} layers: keep 2..{n_layers}")
    return keep
