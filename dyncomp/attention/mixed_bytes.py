"""What a cache of two precisions takes, counted from what it holds."""

import dataclasses

import jax
import jax.numpy as jnp

from dyncomp.attention.mixed_precision import MixedCache


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes of a layer's cache for one sequence, a mean over the batch.

    Attributes:
      codes: of packed keys and values that hold a token.
      metadata: steps, lows and scales, and the places of tokens.
      window: of full-precision tokens.
      dense: what a cache of all these tokens at full precision takes.
      allocated: of everything, empty room included.
      tokens: how many tokens are held.
      packed: how many of them are compressed.
    """

    codes: float
    metadata: float
    window: float
    dense: float
    allocated: float
    tokens: float
    packed: float


def cache_bytes(cache: MixedCache) -> Bytes:
    """Counts a layer's cache, on the host; stacked ones must be taken apart."""
    b, g, _, p = cache.keys.shape
    item = cache.keys.dtype.itemsize
    codes = metadata = packed = 0.0
    layouts = cache.policy.stores(cache.keys.dtype.name)
    parts = [(layouts[0], cache.prompt, 1)]
    if cache.spans is not None:
        parts.append((layouts[1], cache.spans, int(cache.used)))
    for layout, stored, groups in parts:
        held = stored.positions >= 0
        at = jnp.arange(layout.slots) < stored.count[..., None]
        front, back = (int(jnp.sum(held & own)) / b for own in (at, ~at))
        rows = front * layout.row(p, layout.high) + back * layout.row(p, layout.low)
        codes += 2 * g * rows
        channels = groups * 3 * 4 * 2 * g * p
        metadata += channels + (front + back) * 3 * 4
        packed += front + back
    window = int(jnp.sum(cache.positions >= 0)) / b
    tokens = packed + window
    allocated = sum(x.nbytes for x in jax.tree.leaves(cache)) / b
    each = 2 * g * p * item
    return Bytes(codes, metadata, window * each, tokens * each, allocated, tokens, packed)
