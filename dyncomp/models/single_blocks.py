"""Blocks that run one by one, or are looked at one by one: names, side results and outputs in order of execution."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.core.aux import Aux, nest
from dyncomp.core.typing import Array, Float
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
