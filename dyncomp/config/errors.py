"""What is wrong with a config, where, and how to put it right."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dyncomp.core.errors import DyncompError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One reason to refuse a config.

    Attributes:
      file: the config file, or ``command line``, or ``text`` for a config given as a string.
      line: counted from 1; on the command line, the number of the override.
      message: what is wrong.
      fix: what to write instead.
    """

    file: str
    line: int
    message: str
    fix: str

    @property
    def where(self) -> str:
        """``file:line``, the file relative to the current folder where that is shorter."""
        return f"{shorten(self.file)}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.fix}"


class ConfigError(DyncompError):
    """A config that was refused; ``problems`` holds every reason."""

    def __init__(self, problems: Sequence[Problem]):
        more = f" (and {len(problems) - 1} more: dyncomp config check)" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}")
        self.problems = tuple(problems)


def shorten(file: str) -> str:
    """The path relative to the current folder where that is shorter."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
