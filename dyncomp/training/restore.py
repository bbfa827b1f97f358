"""A trained model back in a notebook: model, variables and config from a work directory."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.training.checkpoint import read_newest
from dyncomp.training.run import Run
from dyncomp.training.state import init_variables, paths


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model.

    Attributes:
      model: the Linen module; call it with `dyncomp.models.apply(model, variables, inputs)`.
      variables: parameters (averaged ones where the run kept them) and controls.
      run: how it was trained.
      config_text: the config as saved with the run.
    """

    model: nn.Module
    variables: dict[str, Any]
    run: Run
    config_text: str

    def apply(self, inputs: Any, **options: Any) -> Any:
        """(output, Aux) of the model on ``inputs``."""
        from dyncomp.models.layout import apply

        return apply(self.model, self.variables, inputs, **options)


def load(workdir: Path | str, run: Run) -> Loaded:
    """Reads the newest undamaged checkpoint.

    Raises:
      DyncompError: none is there, or it is of another model.
    """
    workdir = Path(workdir)
    found = read_newest(workdir)
    source = "ema" if any(path.startswith("ema/") for path in found) else "params"
    sample = run.task.source("train").batch(jax.numpy.arange(1).__array__())
    shapes = jax.eval_shape(lambda x: init_variables(run.model, x, 0), sample["inputs"])
    shapes = nn.meta.unbox(shapes)
    out = {}
    for name, origin in (("params", source), ("controls", "controls")):
        leaves, treedef = jax.tree.flatten(shapes[name])
        keys = [f"{origin}/{path}" for path in paths(shapes[name])]
        for key, leaf in zip(keys, leaves, strict=True):
            if key not in found or found[key].shape != leaf.shape:
                raise DyncompError(
                    f"{workdir} is of another model: {key} is missing or has another shape"
                )
        out[name] = jax.tree.unflatten(treedef, [jax.numpy.asarray(found[key]) for key in keys])
    config = workdir / "config.gin"
    return Loaded(run.model, out, run, config.read_text() if config.exists() else "")
