"""The objective of `models.StoppingLM`'s controller: labels from the heads' own answers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Bool, Float
from dyncomp.depth import controller_loss, decision_labels, exit_logits


@dataclasses.dataclass(frozen=True)
class StoppingObjective:
    """Cross-entropy of the controller's decisions (arXiv 2401.09964, stage 3 as in its code).

    A label is "stop" where no exit's argmax is the target, else "continue" before the first that is right and "exit"
    from there on. The heads' answers are made one exit at a time, without gradient.

    Attributes:
      weighting: "ordinal", exit k of 1, 2, .. weighs k; "uniform", all the same (ablation).
    """

    weighting: Literal["ordinal", "uniform"] = "ordinal"

    def __call__(
        self, output: Mapping[str, Array], aux: Aux, batch: Mapping[str, Any], step: Any
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The loss; metrics: how often decisions are the labels, and how often no exit is right.

        Raises:
          DyncompError: output of another model.
        """
        if not isinstance(output, Mapping) or "decisions" not in output:
            raise DyncompError("StoppingObjective trains models.StoppingLM: make it the model")
        labels = decision_labels(exits_right(output, batch["targets"]))
        mask = jnp.asarray(batch["mask"], jnp.float32).reshape(-1)
        said = output["decisions"].reshape(len(labels), -1, 3)
        loss = controller_loss(said, labels, mask, weighting=self.weighting)
        same = (jnp.argmax(said, axis=-1) == labels).mean(axis=0, dtype=jnp.float32)
        lost = (labels[0] == 0).astype(jnp.float32)
        return loss, {"agreement": Mean.of(same, mask), "never_right": Mean.of(lost, mask)}


def exits_right(output: Mapping[str, Array], targets: Any) -> Bool[Array, "x n"]:
    """Whether each exit's argmax is the target, from a `models.NestedLM`'s output; targets [b t] flattened."""
    wanted = jnp.asarray(targets)
    right = lambda exit: (jnp.argmax(exit_logits(output, exit), axis=-1) == wanted).reshape(-1)
    found = lax.map(right, jnp.arange(output["states"].shape[0]))
    return jax.lax.stop_gradient(found)
