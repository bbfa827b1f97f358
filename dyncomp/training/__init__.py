"""Training: runs, stages, optimizers, checkpoints that can be trusted, evaluation of quality and compute."""

from dyncomp.training.optimizers import SGD, AdamW, Alternating, Grouped
from dyncomp.training.run import Run, Stage
from dyncomp.training.state import TrainState
from dyncomp.training.suite import Suite
from dyncomp.training.warm_start import InitFrom

__all__ = [
    "SGD",
    "AdamW",
    "Alternating",
    "Grouped",
    "InitFrom",
    "Run",
    "Stage",
    "Suite",
    "TrainState",
]
