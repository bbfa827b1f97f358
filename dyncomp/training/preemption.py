"""Being asked to stop: SIGTERM to this process, or to any process of the job."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class Terminator:
    """Whether the run is asked to stop, the same answer after the same step in every process.

    In one process a handler remembers SIGTERM (only the main thread may ask for signals). In several JAX's own handler
    stays: its preemption service tells all processes and agrees on a step that none of them has passed.
    """

    def __init__(self) -> None:
        self.asked, self.looks, self.alone = False, 0, jax.process_count() == 1

    def __enter__(self) -> "Terminator":
        self.before = None
        if self.alone:
            try:
                self.before = signal.signal(signal.SIGTERM, self._ask)
            except ValueError:
                pass
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def look(self) -> bool:
        """Whether to save and stop now; call it once after every step."""
        self.looks += 1  # not the step, which a rollback sets back
        if not self.alone and multihost_utils.reached_preemption_sync_point(self.looks):
            self.asked = True
        return self.asked

    def __exit__(self, *_: Any) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
