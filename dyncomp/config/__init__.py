"""The one adapter to gin: configs in gin's language, checked, shown and built.

``load("quickstart", ["training.Run.seed=1"])`` builds the run; ``check`` lists every reason to refuse a config. A
config can name any importable callable: treat one from elsewhere as you would a script.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dyncomp.config import build as _build
from dyncomp.config import rules, source, text, trial
from dyncomp.config.catalog import find, header, shipped, slugs
from dyncomp.config.errors import ConfigError, Problem
from dyncomp.config.program import Program, link
from dyncomp.config.text import Override

__all__ = [
    "ConfigError",
    "Override",
    "Problem",
    "Shown",
    "check",
    "find",
    "header",
    "load",
    "operative",
    "shipped",
    "show",
    "slugs",
]

Root = Callable[..., Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A resolved config: one flat text, and which bindings were overridden where."""

    text: str
    overrides: tuple[Override, ...]


def check(
    name_or_text: str | Path, overrides: Sequence[str] = (), root: Root = None
) -> list[Problem]:
    """Every problem of a config; an empty list when it is sound.

    What passes the rules is built and, where it is a `Run` or `Suite`, tried out with abstract shapes: no data are
    needed, nothing is computed.

    Args:
      name_or_text: a shipped name, a path, or the config itself (more than one line, or with ``=``).
      overrides: ``NAME=VALUE`` bindings that win over the config's.
      root: what the config builds; default `dyncomp.training.Suite` where one is bound, else `training.Run`.

    Raises:
      DyncompError: no config of that name.
    """
    top = _read(name_or_text, overrides)
    program = link(top)
    root = root or _root(program)
    return rules.problems(top, root) or trial.problems(program, root)


def load(name_or_text: str | Path, overrides: Sequence[str] = (), root: Root = None) -> Any:
    """Builds the object a config describes (a `Run`, or a `Suite` of runs). Arguments as for `check`.

    Raises:
      ConfigError: the config has problems; the message is the first one.
    """
    program, root = _sound(name_or_text, overrides, root)
    return _build.build(program, root)


def show(name_or_text: str | Path, overrides: Sequence[str] = (), root: Root = None) -> Shown:
    """The resolved config and its overrides. Arguments and errors as for `load`; nothing is built."""
    program, root = _sound(name_or_text, overrides, root)
    return Shown(text=text.flatten(program, root), overrides=tuple(text.overrides(program)))


def operative(name_or_text: str | Path, overrides: Sequence[str] = (), root: Root = None) -> str:
    """The flat text saved with a run: `load` of it builds an equal object. Arguments as for `load`."""
    return show(name_or_text, overrides, root).text


def _read(name_or_text: str | Path, overrides: Sequence[str]) -> source.Source:
    given = str(name_or_text)
    is_text = isinstance(name_or_text, str) and ("\n" in given or "=" in given)
    top = source.read_text(given) if is_text else source.read(find(name_or_text))
    return source.on_command_line(top, list(overrides)) if overrides else top


def _sound(
    name_or_text: str | Path, overrides: Sequence[str], root: Root
) -> tuple[Program, Callable[..., Any]]:
    top = _read(name_or_text, overrides)
    program = link(top)
    root = root or _root(program)
    found = rules.problems(top, root)
    if found:
        raise ConfigError(found)
    return program, root


def _root(program: Program) -> Callable[..., Any]:
    from dyncomp.training.run import Run
    from dyncomp.training.suite import Suite

    bound = {key[1] for key in program.winners}
    return Suite if id(Suite) in bound else Run
