"""Behaviour cloning of all heads of a multi-exit policy (arXiv 2411.02359)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float

Form = Literal["official", "paper"]


def action_loss(
    actions: Float[Array, "*n a"],
    targets: Float[Array, "*n a"],
    gripper_weight: float,
    form: Form = "official",
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """(pose loss, weighted gripper loss) of each step.

    Args:
      actions: pose, then the gripper's logit.
      targets: pose, then the gripper, -1 or 1.
      gripper_weight: of the binary cross-entropy.
      form: the pose's loss: ``official``, the mean over its numbers of Huber's loss with delta 1; ``paper``, squares.
    """
    pose, wanted = actions[..., :-1], targets[..., :-1]
    each = (
        jnp.square(pose - wanted) if form == "paper" else optax.huber_loss(pose, wanted, delta=1.0)
    )
    label = (targets[..., -1] + 1.0) / 2.0
    gripper = optax.sigmoid_binary_cross_entropy(actions[..., -1], label)
    return jnp.mean(each, axis=-1), gripper_weight * gripper


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionObjective:
    """The sum, each with weight 1, of the loss of every auxiliary head and of the shared head on each drawn sequence.

    With six exits and both ways of drawing these are eight terms.

    Attributes:
      gripper_weight: 0.01 on CALVIN, 0.05 on a real robot (released code).
      form: ``official`` takes Huber's loss and the mean over steps, ``paper`` squares and the sum over steps.
    """

    gripper_weight: float = 0.01
    form: Form = "official"

    def __post_init__(self):
        if self.form not in ("official", "paper"):
            raise DyncompError(f"form={self.form!r}: use 'official' or 'paper'")

    def __call__(
        self, output: Mapping[str, Array], aux: Any, batch: Mapping[str, Any], step: Any
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Loss and its parts; reads ``auxiliary`` [x b t a] (perhaps x = 0) and ``drawn`` [k b t a]."""
        heads = jnp.concatenate([output["auxiliary"], output["drawn"]])
        targets, mask = jnp.asarray(batch["targets"]), jnp.asarray(batch["mask"])
        wanted = jnp.broadcast_to(targets[None], heads.shape)
        pose, gripper = action_loss(heads, wanted, self.gripper_weight, self.form)
        count = jnp.maximum(jnp.sum(mask), 1.0)
        if self.form == "paper":  # a sum over steps is the mean times the window
            count = count / mask.shape[1]
        terms = jnp.sum((pose + gripper) * mask[None], axis=(1, 2)) / count
        own = len(output["drawn"])
        metrics = {
            "pose_loss": Mean.of(pose[-own:], mask[None]),
            "gripper_loss": Mean.of(gripper[-own:], mask[None]),
        }
        return jnp.sum(terms), metrics
