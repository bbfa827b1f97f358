"""A trained model back in a notebook: model, variables and config from a work directory."""

import dataclasses
from collections.abc import Callable
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


def saved_run(workdir: Path, loader: Callable[[str], Any]) -> Run:
    """The run that a work directory's config describes.

    Args:
      workdir: of a run, or of a member of a suite.
      loader: config text to `Run` or `Suite`; `dyncomp.config.load`.

    Raises:
      DyncompError: no config was saved there, or it is a suite with no run selected.
    """
    config = workdir / "config.gin"
    text = config.read_text() if config.exists() else ""
    if not text.strip():
        raise DyncompError(f"{workdir} holds no config.gin: pass the run, load(workdir, run)")
    built = loader(text)
    run = built.selected() if hasattr(built, "selected") else built
    if run is None:
        raise DyncompError(f"{workdir} is a suite: load one of its runs, a folder below it")
    return run


def load(
    workdir: Path | str, run: Run | None = None, *, loader: Callable[[str], Any] | None = None
) -> Loaded:
    """Reads the newest undamaged checkpoint.

    Args:
      workdir: of a run.
      run: how it was trained; default, what its saved config says.
      loader: builds a run from config text, needed without ``run``.

    Raises:
      DyncompError: none is there, or it is of another model.
    """
    workdir = Path(workdir)
    if run is None:
        if loader is None:
            raise DyncompError("load needs the run, or a loader such as dyncomp.config.load")
        run = saved_run(workdir, loader)
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
