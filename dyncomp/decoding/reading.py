"""Reading on in a text, several tokens at once, and taking tokens back: pure functions of a cache.

Rows of a batch may read different numbers of tokens. The cache has one fill level for all rows, so the shorter ones
leave slots empty; nothing sees those, but a cache for several rows must be larger than their texts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.attention import CacheState, truncate
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int
from dyncomp.decoding.net import Net
from dyncomp.models import DecoderLM


@struct.dataclass
class Reading:
    """How far a model has read; donated to the next step.

    Attributes:
      cache: of all that was read.
      read: int32 [b], tokens of each row: the next one's position.
    """

    cache: Any
    read: Int[Array, "b"]

    @property
    def slots(self) -> Int[Array, ""]:
        """Slots of the cache in use, those that single rows waste included."""
        return jax.tree.leaves(self.cache, is_leaf=_is_cache)[0].length


def begin(model: DecoderLM, batch: int, capacity: int) -> Reading:
    """Nothing read yet."""
    return Reading(model.init_cache(batch, capacity), jnp.zeros((batch,), jnp.int32))


def read(
    net: Net, reading: Reading, tokens: Int[Array, "b t"], counts: Int[Array, "b"]
) -> tuple[Float[Array, "b t d"], Reading, Any]:
    """Reads on: the first ``counts`` tokens of each row; columns that no row uses leave no slot behind.

    Returns:
      the last block's output (of padding: anything), the reading after it, events.
    """
    column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    mask = column < counts[:, None]
    positions = reading.read[:, None] + jnp.clip(column, 0, jnp.maximum(counts - 1, 0)[:, None])
    x, aux = net.hidden(tokens, positions, mask, reading.cache)
    after = each_cache(lambda cache: truncate(cache, reading.slots + jnp.max(counts)), aux.cache)
    return x, Reading(after, reading.read + counts), aux.events


def unread(
    reading: Reading, start: Int[Array, ""], before: Int[Array, "b"], kept: Int[Array, "b"]
) -> Reading:
    """Takes back all but the first ``kept`` tokens of what was read since there were ``start`` slots.

    Every row must have filled its slots from ``start`` on without a gap; ``before`` is what had been read then.

    Raises:
      DyncompError: a cache that forgets, and so cannot give back what the tokens displaced.
    """

    def cut(cache: Any) -> Any:
        if getattr(cache.policy, "forgets", False):
            raise DyncompError(
                f"{type(cache.policy).__name__} forgets tokens and cannot take back others; use FullCache"
            )
        return truncate(cache, start + kept)

    return Reading(each_cache(cut, reading.cache), before + kept)


def check_rows(model: DecoderLM, rows: int) -> None:
    """Refuses several rows for models that look back a number of slots: rows that differ in length waste some.

    Raises:
      DyncompError: names the fix.
    """
    mixers = _mixers(model)
    windows = [getattr(mixer, "window", None) for mixer in mixers]
    windows += [getattr(policy, "window", None) for policy in cache_policies(model)]
    if rows > 1 and any(windows):
        raise DyncompError(
            f"a window of {max(filter(None, windows))} slots and {rows} rows of different lengths do not go"
            " together; decode one sequence at a time"
        )


def each_cache(fn: Callable[[Any], Any], cache: Any) -> Any:
    """``fn`` on every layer's cache."""
    return jax.tree.map(fn, cache, is_leaf=_is_cache)


def cache_policies(model: DecoderLM) -> list[Any]:
    """The cache policies of the mixers that name one; `MixedHeads` has several."""
    return [
        part.cache(max_length=ROOMY)
        for mixer in _mixers(model)
        for part in _parts(mixer)
        if getattr(part, "cache", None) is not None
    ]


ROOMY = 2**30
"""Slots of a cache that is never made: no policy finds them too few."""


def _mixers(model: DecoderLM) -> list[Any]:
    return [
        block(parent=None, dtypes=model.dtypes).mixer(parent=None)
        for group in model.groups
        for block in group.blocks
    ]


def _parts(mixer: Any) -> list[Any]:
    """A mixer, or those that its heads are shared between."""
    parts = getattr(mixer, "parts", None)
    return [make(parent=None) for make in parts.values()] if parts else [mixer]


def _is_cache(node: Any) -> bool:
    return isinstance(node, CacheState)


def newest(x: Float[Array, "b t d"], counts: Int[Array, "b"]) -> Float[Array, "b 1 d"]:
    """Of each row, the output of its last real token (its first one where it has none)."""
    return jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
