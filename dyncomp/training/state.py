"""The state of a run as one explicit pytree."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dyncomp.core.rng import fold
from dyncomp.core.typing import Array


class TrainState(struct.PyTreeNode):
    """All that changes while training.

    Attributes:
      step: int32 scalar, how many steps were taken; the position in the data too.
      params: parameters, stacked per group.
      controls: run-time knobs (thresholds, dual variables, balancing biases).
      opt_state: of the current stage.
      ema: moving average of the parameters, or None.
      controller: memory of the current stage's controller, or None.
    """

    step: Any  # unchecked like the rest: the same tree also holds shapes and shardings
    params: Any
    controls: Any
    opt_state: Any
    ema: Any = None
    controller: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """For `models.apply`: the averaged parameters where there are any."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, "controls": self.controls}


def init_variables(model: nn.Module, inputs: Any, seed: int | Array) -> dict[str, Any]:
    """Parameters and controls of a model, drawn from ``seed`` alone; logical axis boxes are kept."""
    keys = {name: fold(seed, 0, name) for name in ("params", "router", "dropout")}
    variables = model.init(keys, inputs)
    return {"params": variables["params"], "controls": variables.get("controls", {})}


def new_state(variables: Any, tx: Any, ema: bool) -> TrainState:
    """Step 0 from unboxed variables."""
    params = nn.meta.unbox(variables["params"])
    copy = jax.tree.map(jnp.copy, params) if ema else None
    controls = nn.meta.unbox(variables["controls"])
    return TrainState(jnp.int32(0), params, controls, tx.init(params), copy)


def paths(tree: Any) -> list[str]:
    """``a/b/c`` of every leaf, in flattening order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
