"""One pass over several continuations of a text at once: each new slot sees the cache, its ancestors and itself."""

from typing import Any

import jax.numpy as jnp

from dyncomp.core.aux import count
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp.decoding.net import Net, gather_events
from dyncomp.decoding.reading import Reading
from dyncomp.models import DecoderLM, layer_caches, with_layer_caches


def check_branches(model: DecoderLM) -> None:
    """Refuses mixers that cannot be told which slots to see, or that count slots backwards.

    Raises:
      DyncompError: names the fix.
    """
    for group in model.groups:
        for block in group.blocks:
            mixer = block(parent=None, dtypes=model.dtypes).mixer(parent=None)
            if getattr(mixer, "window", None) or not hasattr(mixer, "window"):
                raise DyncompError(
                    f"{type(mixer).__name__}: branches of a text need attention.Attention without a window"
                )


def read_branches(
    net: Net,
    reading: Reading,
    tokens: Int[Array, "b n"],
    depth: Int[Array, "#b n"],
    visible: Bool[Array, "#b n w"],
    mask: Bool[Array, "b n"],
    vectors: Float[Array, "#b n d"] | None = None,
) -> tuple[Float[Array, "b n d"], Reading, Any]:
    """Reads ``tokens`` as branches after the text; all their slots stay in the cache until somebody drops them.

    Args:
      tokens: int32; where negative, the entry of ``vectors`` is read instead of an embedding.
      depth: int32, distance from the first token after the text: its position.
      visible: of the newest w slots, the n new ones included, which each new one sees (`attention.Attention`).
      mask: False for padding.

    Returns:
      the last block's output, the reading (how many tokens were read is not changed), events.
    """
    positions = jnp.where(mask, reading.read[:, None] + depth, 0)
    if net.model.learned_positions is not None:  # what lies past the end is never written
        positions = jnp.minimum(positions, net.model.learned_positions - 1)
    x, found, after = net.embed(tokens, positions, vectors), [], []
    for index, cache in enumerate(layer_caches(reading.cache)):
        x, own, events = net.block(index, x, positions, mask, cache, visible)
        after.append(own)
        found.append((index, events))
    seen = count(jnp.sum(mask, dtype=jnp.int32), mask.size)
    events = {"embed": {"tokens": seen}, **gather_events(net, found)}
    return x, Reading(with_layer_caches(reading.cache, after), reading.read), events
