"""What blocks and models return beside their output."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.typing import Array, Float


@struct.dataclass
class Count:
    """How often an event happened: required by the plan, and executed (padding and masked work included).

    Attributes:
      needed: int32, any shape (a leading layer axis under a scanned group, a batch axis per sample).
      executed: int32, same shape.
    """

    needed: Any  # unchecked: jax also builds trees of shapes, shardings and None
    executed: Any


def count(needed: Any, executed: Any = None) -> Count:
    """Makes a `Count` of int32; ``executed`` defaults to ``needed``."""
    needed = jnp.asarray(needed, jnp.int32)
    return Count(needed, needed if executed is None else jnp.asarray(executed, jnp.int32))


@struct.dataclass
class Aux:
    """Side results of a block or a model.

    Attributes:
      losses: raw, unweighted auxiliary losses, float32; nested dict, the last key is the loss's name.
      events: nested dict of `Count`; same keys as the module's ``cost()`` table.
      plans: nested dict of plans and other pictures; empty unless captured.
      cache: the updated key/value cache or recurrent state, or None.
      below: what a unit hands up to the next one of its kind (a router's logits), leaves [b t ...]; blocks carry it
        over depth and it is empty in what a model returns.
    """

    losses: Mapping[str, Any] = struct.field(default_factory=dict)
    events: Mapping[str, Any] = struct.field(default_factory=dict)
    plans: Mapping[str, Any] = struct.field(default_factory=dict)
    cache: Any = None
    below: Mapping[str, Any] = struct.field(default_factory=dict)


def nest(**parts: Aux) -> Aux:
    """Merges the side results of named sub-modules, each under its name; empty entries are left out."""

    def gather(field: str) -> dict[str, Any]:
        return {name: getattr(aux, field) for name, aux in parts.items() if getattr(aux, field)}

    cache = {name: aux.cache for name, aux in parts.items() if aux.cache is not None}
    return Aux(gather("losses"), gather("events"), gather("plans"), cache or None)


def flatten(tree: Mapping[str, Any], leaf: type | tuple[type, ...] = object) -> dict[str, Any]:
    """Flattens nested dicts to ``{"a/b/c": value}``; stops at non-dict values."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if isinstance(node, Mapping):
            for key in node:
                yield from walk(node[key], (*path, str(key)))
        else:
            yield "/".join(path), node

    return dict(walk(tree, ()))


def losses_by_name(losses: Mapping[str, Any]) -> dict[str, list[Float[Array, "..."]]]:
    """Groups the raw losses of all layers by their last path component, in path order."""
    named: dict[str, list[Any]] = {}
    for path, value in flatten(losses).items():
        named.setdefault(path.rsplit("/", 1)[-1], []).append(jnp.atleast_1d(value))
    return named


def add_counts(a: Mapping[str, Any], b: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds two event trees of equal structure."""
    return jax.tree.map(jnp.add, a, b)
