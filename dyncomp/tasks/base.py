"""What a task is: random-access data in four splits, a default objective, and mergeable metrics."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean

Split = Literal["train", "validation", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "calibration", "test")
Batch = Mapping[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ``indices`` (int64 [b]), stacked; ``inputs``, ``targets``, and ``mask`` float32."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Model output to loss; a frozen dataclass, so that it can be a static argument."""

    def __call__(
        self, output: Any, aux: Any, batch: Batch, step: Any
    ) -> tuple[Any, dict[str, Mean]]:
        """Scalar float32 loss and metrics."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """Base of all tasks.

    Attributes:
      headline: the metric a Pareto plot shows.
      minimize: whether less of it is better.
    """

    headline: ClassVar[str] = "loss"
    minimize: ClassVar[bool] = True

    def source(self, split: Split) -> Source:
        """Examples of a split.

        Raises:
          DyncompError: the split is unknown or the data are missing; the message names the fix.
        """
        raise NotImplementedError

    def objective(self) -> Objective:
        """The default objective."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """Shape and dtype of one example of a batch; known without the data where the options say it."""
        example = self.source("train").batch(np.zeros((1,), np.int64))
        return {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in example.items()}

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """What a reader can look at for a batch of inputs; kept beside captured decisions. Nothing by default.

        Reports know ``bytes`` uint8 [n] with ``widths`` int32 [b t] (the bytes of all tokens one after another, and
        how many each token covers), and ``images`` float32 [b h w c] in 0..1.
        """
        return {}

    def metrics(self, output: Any, batch: Batch) -> dict[str, Mean]:
        """Metrics of one batch, as sums and counts."""
        raise NotImplementedError

    def summarize(self, metrics: Mapping[str, Mean]) -> dict[str, float]:
        """Merged metrics to the figures a reader sees."""
        return {name: mean.value() for name, mean in metrics.items()}


def check_split(split: str) -> None:
    """Refuses an unknown split."""
    if split not in SPLITS:
        raise DyncompError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A source over arrays in memory; ``mask`` is 1 for every example.

    Attributes:
      arrays: name -> [n ...]; all of one length.
    """

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows at ``indices``."""
        rows = {name: values[indices] for name, values in self.arrays.items()}
        return {**rows, "mask": np.ones(len(indices), np.float32)}


def part(key: str, shares: Mapping[str, float]) -> str:
    """A split for a key, by hash: stable whatever else is in the collection."""
    point = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    for name, share in shares.items():
        if point < share:
            return name
        point -= share
    return next(iter(shares))
