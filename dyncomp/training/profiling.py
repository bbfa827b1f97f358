"""A profile of some steps, for xprof or TensorBoard."""

import re
from pathlib import Path
from typing import Any

import jax

from dyncomp.core.errors import DyncompError


class Profile:
    """Traces steps ``first`` .. ``last`` of a process, both included, into ``folder``.

    Args:
      text: ``steps=10..15``.
      folder: read by ``xprof --logdir`` and TensorBoard's profile plugin.

    Raises:
      DyncompError: the text says something else.
    """

    def __init__(self, text: str, folder: Path):
        found = re.fullmatch(r"steps=(\d+)\.\.(\d+)", text)
        self.first, self.last = (int(n) for n in found.groups()) if found else (0, 0)
        if not 1 <= self.first <= self.last:
            raise DyncompError(f"--profile {text!r}: write steps=10..15, counted from 1")
        self.folder, self.tracing = folder, False

    def before(self, step: int) -> None:
        """Starts where step ``step`` is the next to run."""
        if not self.tracing and self.first <= step <= self.last:
            jax.profiler.start_trace(str(self.folder))
            self.tracing = True

    def after(self, step: int, state: Any) -> None:
        """Stops where ``step`` was the last, once ``state`` is there."""
        if self.tracing and step >= self.last:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Writes what was traced, if anything."""
        if self.tracing:
            jax.profiler.stop_trace()
        self.tracing = False
