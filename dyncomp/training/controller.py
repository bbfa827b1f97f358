"""Controllers act between steps: calibrate thresholds, adapt dual variables, stop single heads."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from dyncomp.tasks.base import Task
from dyncomp.training.state import TrainState

Forward = Callable[[Mapping[str, Any]], tuple[Any, Any]]
"""A batch to (output, aux) under the current state, compiled."""


@runtime_checkable
class Controller(Protocol):
    """A frozen dataclass; all it remembers is in ``state.controller``."""

    def init(self, state: TrainState) -> Any:
        """Its memory at the start of a stage: a pytree of arrays."""
        ...

    def __call__(self, state: TrainState, forward: Forward, task: Task, step: int) -> TrainState:
        """The state with changed controls, parameters or memory. Reads validation or calibration data only."""
        ...
