"""Blocks that run one by one, or are looked at one by one: names, side results and outputs in order of execution."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.attention.attention import PAIR_BLOCK
from dyncomp.core.aux import Aux, Count, nest
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp.models.group import Group


def block_places(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Of every block, in order of execution, the names its side results lie under: group and block of the period."""
    return [
        (f"group_{g}", f"block_{j}")
        for g, group in enumerate(groups)
        for _ in range(group.repeat)
        for j in range(len(group.blocks))
    ]


def join_blocks(groups: Sequence[Group], found: Sequence[tuple[int, Aux]]) -> Aux:
    """Side results of single blocks, ``(index, aux)``, nested and stacked as the whole model nests them; no caches.

    The leading axis of a leaf is as long as blocks ran in its place, not as the group repeats.
    """
    places = block_places(groups)
    parts: dict[str, dict[str, list[Aux]]] = {}
    for index, aux in found:
        group, block = places[index]
        bare = dataclasses.replace(aux, cache=None, below={})
        parts.setdefault(group, {}).setdefault(block, []).append(bare)
    join = lambda same: jax.tree.map(lambda *leaves: jnp.stack(leaves), *same)
    each = {g: nest(**{b: join(same) for b, same in own.items()}) for g, own in parts.items()}
    return nest(**each)


def block_outputs(groups: Sequence[Group], plans: Mapping[str, Any]) -> list[Float[Array, "b t d"]]:
    """Every block's output in order of execution, from the plans of a pass with ``capture=("hidden",)``."""
    outputs = []
    for g, group in enumerate(groups):
        own = [plans[f"group_{g}"][f"block_{j}"]["hidden"] for j in range(len(group.blocks))]
        outputs += [stacked[layer] for layer in range(group.repeat) for stacked in own]
    return outputs


def kv_cost(model: Any) -> Cost:
    """Price of one row's keys and values in one block of a `DecoderLM`, the block not run."""
    mixer = model.groups[0].blocks[0](parent=None, dtypes=model.dtypes).mixer(parent=None)
    _, kv_heads, head_dim = mixer.sizes(model.d_model)
    return Cost(4 * model.d_model * kv_heads * head_dim)


def needed_until(
    groups: Sequence[Group],
    events: Mapping[str, Any],
    ran: Int[Array, "b t"],
    real: Bool[Array, "b t"],
) -> dict[str, Any]:
    """Events of dense blocks that need only the tokens that run them; what was executed stays.

    Args:
      groups, events: of a whole pass without a cache.
      ran: blocks that each token runs.
      real: False for padding.

    Raises:
      DyncompError: an event whose need depends on more than which tokens run, or a window of attention.
    """
    places, seen = block_places(groups), jnp.cumsum(real, axis=1, dtype=jnp.int32)
    found = {name: dict(value) for name, value in events.items()}
    for group, block in dict.fromkeys(places):
        layers = jnp.asarray([i for i, place in enumerate(places) if place == (group, block)])
        runs = (ran[None] > layers[:, None, None]) & real[None]
        pairs = jnp.sum(jnp.where(runs, seen[None], 0), axis=2)
        blocks = jnp.sum(pairs // PAIR_BLOCK, axis=1)
        tokens = jnp.sum(runs, axis=(1, 2), dtype=jnp.int32)
        needed = {"tokens": tokens, "projections": tokens, "pair_blocks": blocks,
                  "pairs": jnp.sum(pairs % PAIR_BLOCK, axis=1)}  # fmt: skip
        found[group][block] = _replaced(found[group][block], needed)
    if any(getattr(make(parent=None).mixer(parent=None), "window", None)
           for group in groups for make in group.blocks):  # fmt: skip
        raise DyncompError("exits of attention with a window have no exact price; leave window out")
    return found


def _replaced(events: Mapping[str, Any], needed: Mapping[str, Array]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in events.items():
        if isinstance(value, Count):
            if name not in needed:
                raise DyncompError(
                    f"exits price dense blocks only; event {name!r} has no fixed need"
                )
            out[name] = Count(needed[name].astype(jnp.int32), value.executed)
        else:
            out[name] = _replaced(value, needed)
    return out
