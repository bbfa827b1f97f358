"""A window of a long pass, computed by blocks around the band."""

import jax.numpy as jnp

from dyncomp.attention.local import on_own_heads
from dyncomp.attention.patterns import AShape
from dyncomp.attention.sight import Sight
from dyncomp.core.typing import Array, Float, Int

LONG = 4096
"""Passes from here on take blocks, where a window is narrow enough for them to be far fewer than all."""


def band_serves(t: int, sight: Sight) -> bool:
    """Whether `banded` is the form for a pass of ``t`` positions."""
    narrow = sight.window is not None and 4 * sight.window <= t
    return narrow and t >= LONG and sight.visible is None


def banded(
    q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight
) -> tuple[Float[Array, "b t h p"], Int[Array, ""]]:
    """Attention within the window of ``sight``, exact by the slot, and the pairs computed of a sequence."""
    assert sight.window is not None
    mixed, pairs = on_own_heads(AShape(sight.window), q, k, v, sight, None, padded=False)
    return mixed, jnp.round(pairs.executed).astype(jnp.int32)
