"""Stacked and separate layers: the only conversions, and the one way to apply a model.

Stacked variables hold all layers of a group under the key ``layers``, each leaf with a leading layer axis. Separate
ones hold ``layers_0``, ``layers_1``, ... Both conversions move bits and do no arithmetic. Under differentiation
``unstack`` is one `lax.split` a leaf, so the gradient is one concatenation and never a chain of scatters.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.typing import Variables

STACKED = "layers"
_SEPARATE = re.compile(r"layers_(\d+)")


def is_stacked(tree: Mapping[str, Any]) -> bool:
    """Whether any group of the tree is stacked."""
    return any(
        key == STACKED or (isinstance(value, Mapping) and is_stacked(value))
        for key, value in tree.items()
    )


def unstack(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``layers`` -> ``layers_i``: separate weights for execution. Works on parameters, controls, gradients, caches."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if key == STACKED:
            for index, layer in enumerate(_split(nn.meta.unbox(value))):
                out[f"{STACKED}_{index}"] = layer
        else:
            out[key] = unstack(value) if isinstance(value, Mapping) else value
    return out


def stack(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``layers_i`` -> ``layers``: the layout of checkpoints and of scanned execution; inverse of `unstack`."""
    out: dict[str, Any] = {}
    separate: dict[int, Any] = {}
    for key, value in tree.items():
        found = _SEPARATE.fullmatch(key)
        if found:
            separate[int(found.group(1))] = nn.meta.unbox(value)
        else:
            out[key] = stack(value) if isinstance(value, Mapping) else value
    if separate:
        layers = [separate[index] for index in range(len(separate))]
        out[STACKED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return out


def layer_caches(cache: Mapping[str, Any]) -> list[Any]:
    """The caches of separate layers, one a block, in the order of execution."""
    return [
        blocks[f"block_{j}"]
        for layers in _ordered(cache, "group_")
        for blocks in _ordered(layers, f"{STACKED}_")
        for j in range(len(blocks))
    ]


def with_layer_caches(cache: Mapping[str, Any], layers: Sequence[Any]) -> dict[str, Any]:
    """``cache`` with its blocks' caches replaced, in the order of execution; inverse of `layer_caches`."""
    rest = iter(layers)
    return {
        f"group_{g}": {
            f"{STACKED}_{i}": {f"block_{j}": next(rest) for j in range(len(blocks))}
            for i, blocks in enumerate(_ordered(group, f"{STACKED}_"))
        }
        for g, group in enumerate(_ordered(cache, "group_"))
    }


def _ordered(tree: Mapping[str, Any], prefix: str) -> list[Any]:
    return [tree[f"{prefix}{index}"] for index in range(len(tree))]


def _split(tree: Any) -> list[Any]:
    """One tree a layer."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return []
    repeat = leaves[0].shape[0]
    pieces = [lax.split(jnp.asarray(leaf), (1,) * repeat, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(treedef, [lax.squeeze(piece[index], (0,)) for piece in pieces])
        for index in range(repeat)
    ]


def apply(model: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> Any:
    """``model.apply`` for variables as they are stored: unstacks them when the model runs its layers separately.

    With ``mutable=...`` the returned variables are stacked again.
    """
    if getattr(model, "layers", "scan") != "unroll" or not is_stacked(variables):
        return model.apply(variables, *args, **kwargs)
    out = model.apply(unstack(variables), *args, **kwargs)
    if kwargs.get("mutable", False):
        result, updates = out
        return result, stack(updates)
    return out
