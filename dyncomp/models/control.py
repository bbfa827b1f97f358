"""Pure parts of a policy that decides how much of itself to run."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float
from dyncomp.models.exiting import only_block

LOWEST = -1e30


@struct.dataclass
class ControlState:
    """What a policy remembers between control steps.

    Attributes:
      head: float32 [b s], the head's memory; it has moved once a step, by the exit that was taken.
      exit: int32 [b], the last decision.
      age: int32 [b], steps since it was made.
    """

    head: Any  # unchecked: jax also builds trees of shapes and None
    exit: Any
    age: Any


def pooled(x: Float[Array, "*n t d"], real: Any) -> Float[Array, "*n d"]:
    """The maximum over real positions, float32; 0 where there is none."""
    real = real.astype(bool)[..., None]
    most = jnp.max(jnp.where(real, x.astype(jnp.float32), LOWEST), axis=-2)
    return jnp.where(jnp.any(real, axis=-2), most, 0.0)


def averaged(before: Array, action: Array) -> Array:
    """The mean pose of two actions, the gripper of the second."""
    return jnp.concatenate([(before + action)[:, :-1] / 2, action[:, -1:]], axis=1)


def check_policy(policy: Any) -> None:
    """Refuses options of a `models.MultiExitPolicy` that do not fit each other.

    Raises:
      DyncompError: names the fix.
    """
    allowed = {
        "compare": ("block", "input"),
        "drawing": ("both", "every_step", "two_runs", "last"),
    }
    for name, values in allowed.items():
        if getattr(policy, name) not in values:
            raise DyncompError(
                f"MultiExitPolicy.{name}={getattr(policy, name)!r}: use one of {', '.join(values)}"
            )
    blocks = sum(group.repeat * len(group.blocks) for group in policy.groups)
    exits, first = policy.exits, int(policy.compare == "block")
    if (
        list(exits) != sorted(set(exits))
        or not exits
        or exits[0] < first
        or exits[-1] != blocks - 1
    ):
        raise DyncompError(
            f"MultiExitPolicy.exits={exits}: give ascending block numbers from {first} on; the last is {blocks - 1},"
            f" the last of {blocks} blocks"
        )
    if policy.reuse < 1:
        raise DyncompError(f"MultiExitPolicy.reuse={policy.reuse}: use 1 or more")


def blocks_of(exits: Sequence[int], index: int) -> range:
    """The blocks between exit ``index`` and the one before."""
    return range(0 if index == 0 else exits[index - 1] + 1, exits[index] + 1)


def segment_weights(params: Any, exits: Sequence[int], index: int | None) -> dict[str, Any]:
    """The unstacked parameters of a `models.MultiExitPolicy` that segment ``index`` uses; None: those of ``begin``."""
    blocks = {name for name in params if name.startswith("group_")}
    if index is None:
        return {k: v for k, v in params.items() if k not in blocks | {"act", "auxiliary"}}
    kept: dict[str, Any] = {"act": params["act"]}
    for block in blocks_of(exits, index):
        for name, layers in only_block({n: params[n] for n in blocks}, block).items():
            kept[name] = {**kept.get(name, {}), **layers}
    return kept
