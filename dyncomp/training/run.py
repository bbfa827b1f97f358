"""`Run`: everything that defines a training run; the root of every config."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.parallel.mesh import MeshSpec
from dyncomp.tasks.base import Objective, Task
from dyncomp.training.controller import Controller
from dyncomp.training.optimizers import Optimizer
from dyncomp.training.warm_start import InitFrom


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with its own optimizer, objective and compiled step.

    Attributes:
      steps: how long it lasts.
      optimizer: starts afresh with the stage.
      objective: default the task's.
      trainable: regular expression of parameter paths (``group_0/layers/...``) that move; the rest is frozen.
      controller: called every ``controller_every`` steps to change controls or parameters.
      name: for logs.
    """

    steps: int
    optimizer: Optimizer
    objective: Objective | None = None
    trainable: str = ".*"
    controller: Controller | None = None
    controller_every: int = 0
    name: str = "train"

    def __post_init__(self):
        if self.steps < 1:
            raise DyncompError(f"Stage {self.name!r}: steps={self.steps}; use 1 or more")
        if self.controller and self.controller_every < 1:
            raise DyncompError(f"Stage {self.name!r}: a controller needs controller_every >= 1")
        try:
            re.compile(self.trainable)
        except re.error as error:
            raise DyncompError(
                f"Stage {self.name!r}: trainable={self.trainable!r}: {error}"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A training run. Give either ``optimizer`` and ``steps`` (one stage) or ``stages``.

    Attributes:
      model, task: what is trained on what.
      optimizer, steps, objective, trainable: of the only stage.
      stages: several stages, one after another; the data go on, the optimizer starts afresh.
      batch_size: global batch.
      seed: of parameters, data order and everything random.
      accumulate: split each batch into this many parts and add up their gradients.
      ema: decay of an exponential moving average of the parameters, used in evaluation; None for none.
      log_every, eval_every, save_every: in steps; eval_every=0 evaluates at the end only.
      eval_batches: batches of a mid-training evaluation; None for all. The final one always takes all.
      final_eval_batches: limits the final evaluation too (for demonstrations); None for all.
      max_to_keep: checkpoints that stay.
      rollbacks: how often a loss that is no number, or a spike, sends training back to the last checkpoint; the
        batches since then, up to the bad one, are passed over. 0 stops training instead.
      spike: a loss more than so many times the median of the last 100 is a spike; None for none.
      init_from: parameters of another run to start from.
      mesh: devices' mesh; None for one device.
      sweep: control name -> values: the final evaluation draws quality against compute over them.
      capture: keep the decisions on a validation batch in decisions.npz at the end.
    """

    model: nn.Module
    task: Task
    optimizer: Optimizer | None = None
    steps: int = 0
    objective: Objective | None = None
    trainable: str = ".*"
    stages: Sequence[Stage] = ()
    batch_size: int = 32
    seed: int = 0
    accumulate: int = 1
    ema: float | None = None
    log_every: int = 50
    eval_every: int = 0
    eval_batches: int | None = 20
    final_eval_batches: int | None = None
    save_every: int = 500
    max_to_keep: int = 2
    rollbacks: int = 0
    spike: float | None = None
    init_from: InitFrom | None = None
    mesh: MeshSpec | None = None
    sweep: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    capture: bool = True

    def __post_init__(self):
        if bool(self.stages) == bool(self.optimizer):
            raise DyncompError("Run: give either optimizer and steps, or stages")
        if self.optimizer and self.steps < 1:
            raise DyncompError(f"Run.steps={self.steps}: use 1 or more")
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise DyncompError(
                f"Run: batch_size={self.batch_size} must be a positive multiple of accumulate={self.accumulate}"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise DyncompError(f"Run.ema={self.ema}: use [0, 1) or None")
        if self.rollbacks < 0 or (self.spike is not None and self.spike <= 1):
            raise DyncompError(
                f"Run: rollbacks={self.rollbacks}, spike={self.spike}; use rollbacks >= 0 and spike > 1 or None"
            )
        for name in ("log_every", "save_every", "max_to_keep"):
            if getattr(self, name) < 1:
                raise DyncompError(f"Run.{name}={getattr(self, name)}: use 1 or more")

    def plan(self) -> tuple[Stage, ...]:
        """The stages in order; the objective of each is filled in."""
        stages = tuple(self.stages) or (
            Stage(
                steps=self.steps,
                optimizer=self.optimizer,  # type: ignore[arg-type]
                objective=self.objective,
                trainable=self.trainable,
            ),
        )
        default = self.task.objective()
        return tuple(dataclasses.replace(s, objective=s.objective or default) for s in stages)

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.plan())

    def stage_at(self, step: int) -> tuple[int, int, int]:
        """(index, first step, end) of the stage that takes step ``step``; the last one when training is over."""
        start = 0
        stages = self.plan()
        for index, stage in enumerate(stages):
            if step < start + stage.steps or index == len(stages) - 1:
                return index, start, start + stage.steps
            start += stage.steps
        raise AssertionError("unreachable")

    def replace(self, **changes: Any) -> "Run":
        """A copy with changed fields."""
        return dataclasses.replace(self, **changes)

    def program(self) -> Any:
        """The first stage's train step with abstract shapes: what `dyncomp.parallel.aot` compiles."""
        from dyncomp.training.program import program_of

        return program_of(self)
