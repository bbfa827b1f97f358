"""A task over arrays in memory: cached features of a frozen network, or anything small."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.tasks.base import ArraySource, Split, Task, check_split
from dyncomp.tasks.objectives import ClassificationObjective, classification_metrics


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureTask(Task):
    """Classification of given arrays.

    Attributes:
      arrays: split -> {"inputs": [n ...], "targets": int [n]}.
    """

    headline = "accuracy"
    minimize = False

    arrays: Mapping[str, Mapping[str, np.ndarray]]

    def __post_init__(self):
        for split, arrays in self.arrays.items():
            check_split(split)
            lengths = {name: len(values) for name, values in arrays.items()}
            if len(set(lengths.values())) != 1:
                raise DyncompError(f"FeatureTask {split!r}: arrays of different lengths {lengths}")

    def source(self, split: Split) -> ArraySource:
        """Examples of a split."""
        check_split(split)
        if split not in self.arrays:
            raise DyncompError(
                f"FeatureTask has no {split!r} arrays; it has {', '.join(self.arrays)}"
            )
        return ArraySource(self.arrays[split])

    def objective(self) -> ClassificationObjective:
        """Cross-entropy."""
        return ClassificationObjective()

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """Accuracy and negative log-likelihood of logits [b c]."""
        return classification_metrics(output, batch)
