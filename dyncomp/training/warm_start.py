"""Start from another run's parameters, by rules, with a report of what did not fit."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.training.checkpoint import read_newest
from dyncomp.training.state import TrainState, paths


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Where parameters come from and which.

    Attributes:
      path: a work directory.
      sibling: in the place of ``path``: a run of the same suite that trains before this one; its folder lies beside.
      convert: maps what lies there, ``path -> array``, to what is looked up: `dyncomp.experts.SliceDense` turns dense
        networks into slices.
      include, exclude: regular expressions of parameter paths here.
      rename: pattern of a path here -> replacement that gives its path there (`re.sub`).
      strict: refuse when a parameter that should be loaded is missing there or has another shape.
    """

    path: str = ""
    sibling: str = ""
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    include: str = ".*"
    exclude: str = "$^"
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    strict: bool = False

    def __post_init__(self):
        if bool(self.path) == bool(self.sibling):
            raise DyncompError("InitFrom: give either path or sibling")

    def folder(self, workdir: Path) -> Path:
        """Where to read, for a run in ``workdir``."""
        return workdir.parent / self.sibling if self.sibling else Path(self.path)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each parameter.

    Attributes:
      loaded: paths taken over.
      kept: path -> why it stays as initialised.
      unused: paths there that nothing here asked for.
    """

    loaded: tuple[str, ...]
    kept: Mapping[str, str]
    unused: tuple[str, ...]

    def lines(self) -> list[str]:
        """One line each for what was not loaded."""
        kept = [f"not loaded: {path} ({why})" for path, why in self.kept.items()]
        return kept + [f"not used: {path}" for path in self.unused]


def warm_start(
    state: TrainState, source: InitFrom, workdir: Path = Path()
) -> tuple[TrainState, LoadReport]:
    """Replaces parameters of a fresh state; ``workdir`` is the run's own folder.

    Raises:
      DyncompError: no checkpoint there, nothing fits, or ``strict`` and something does not.
    """
    folder = source.folder(workdir)
    found = read_newest(folder)
    there: Mapping[str, Any] = {
        path[len("params/") :]: leaf for path, leaf in found.items() if path.startswith("params/")
    }
    there = source.convert(there) if source.convert else there
    leaves, treedef = jax.tree.flatten(state.params)
    loaded, kept, out = {}, {}, []
    for path, leaf in zip(paths(state.params), leaves, strict=True):
        origin = _origin(path, source)
        why = _misfit(origin, path, leaf, there, source)
        if why:
            kept[path] = why
        else:
            loaded[path] = origin
            leaf = jax.device_put(np.array(there[origin], leaf.dtype), leaf.sharding)
        out.append(leaf)
    report = LoadReport(tuple(loaded), kept, tuple(sorted(set(there) - set(loaded.values()))))
    asked = {path: why for path, why in kept.items() if why != "excluded"}
    if not loaded or (source.strict and asked):
        first = next(iter(asked.items()), ("", "nothing matches include"))
        raise DyncompError(
            f"init_from {folder}: {first[0]} {first[1]}; change include, exclude or rename"
        )
    params = jax.tree.unflatten(treedef, out)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema), report


def _origin(path: str, source: InitFrom) -> str:
    for pattern, replacement in source.rename.items():
        path = re.sub(pattern, replacement, path)
    return path


def _misfit(origin: str, path: str, leaf: Any, there: Mapping[str, Any], source: InitFrom) -> str:
    if not re.search(source.include, path) or re.search(source.exclude, path):
        return "excluded"
    if origin not in there:
        return f"no {origin} there"
    if there[origin].shape != leaf.shape:
        return f"shape {there[origin].shape} there, {leaf.shape} here"
    return ""
