"""Associative recall with distractors: which value went with this key, far above?"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.tasks.base import SPLITS, Split, Task, check_split
from dyncomp.tasks.objectives import LMObjective, answer_of, token_nll


@dataclasses.dataclass(frozen=True)
class RecallObjective(LMObjective):
    """`LMObjective` at the positions that are asked (``batch["asked"]``)."""

    def __call__(self, output: Any, aux: Any, batch: Mapping[str, Any], step: Any) -> Any:
        """Loss and metrics."""
        return super().__call__(output, aux, {**batch, "mask": batch["asked"]}, step)


@dataclasses.dataclass(frozen=True)
class RecallSource:
    """Examples made on demand: a pure function of the task, the split and the index."""

    task: "Recall"
    split: Split

    def __len__(self) -> int:
        return self.task.examples

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """inputs, targets int32 [b t]; asked and mask float32 [b t]."""
        made = [self.task.example(self.split, int(index)) for index in indices]
        rows = {name: np.stack([one[name] for one in made]) for name in made[0]}
        return {**rows, "mask": np.ones(rows["inputs"].shape, np.float32)}


@dataclasses.dataclass(frozen=True)
class Recall(Task):
    """Pairs of a key and a value, each in *one* position, among distractors; later every key is asked once.

    A token is a number of two digits, ``left + right * radices[0]`` (`models.FactoredLM` adds an embedding of each):
    a pair is (value, key), a question is (mark, key) and wants the value, a distractor is (nothing, filler). With key
    and value in two positions a model must first learn to copy from the one before; that is another task.

    Attributes:
      context: t.
      pairs: of an example, with distinct keys.
      keys, values: how many there are.
      fillers: how many kinds of distractors.
      gap: least distance from a pair to its question.
      examples: of each split.
    """

    headline: ClassVar[str] = "accuracy"
    minimize: ClassVar[bool] = False

    context: int = 512
    pairs: int = 16
    keys: int = 64
    values: int = 16
    fillers: int = 32
    gap: int = 128
    examples: int = 65_536

    def __post_init__(self):
        if not 1 <= self.pairs <= min(self.keys, (self.context - self.gap) // 2):
            raise DyncompError(
                f"Recall: {self.pairs} pairs of {self.keys} keys do not fit before and behind a gap of {self.gap} in"
                f" {self.context} positions; use fewer pairs or a smaller gap"
            )
        if min(self.values, self.fillers, self.gap, self.examples) < 1:
            raise DyncompError("Recall: values, fillers, gap and examples must be 1 or more")

    @property
    def radices(self) -> tuple[int, int]:
        """Symbols of the left digit (values, mark, nothing) and of the right one (keys, fillers)."""
        return self.values + 2, self.keys + self.fillers

    def example(self, split: Split, index: int) -> dict[str, np.ndarray]:
        """One example: inputs, targets int32 [t] and asked float32 [t]."""
        words = np.asarray([SPLITS.index(split), index], np.uint64)
        draw = np.random.Generator(np.random.Philox(key=words))
        room = (self.context - self.gap) // 2
        keys = draw.permutation(self.keys)[: self.pairs]
        values = draw.integers(self.values, size=self.pairs)
        told = draw.permutation(room)[: self.pairs]
        asked = self.context - room + draw.permutation(room)[: self.pairs]
        left = np.full(self.context, self.values + 1)
        right = self.keys + draw.integers(self.fillers, size=self.context)
        left[told], right[told] = values, keys
        left[asked], right[asked] = self.values, keys
        targets, there = np.zeros(self.context, np.int32), np.zeros(self.context, np.float32)
        targets[asked], there[asked] = values, 1.0
        inputs = (left + right * self.radices[0]).astype(np.int32)
        return {"inputs": inputs, "targets": targets, "asked": there}

    def source(self, split: Split) -> RecallSource:
        """Examples of a split; splits share none but by chance."""
        check_split(split)
        return RecallSource(self, split)

    def spec(self) -> dict[str, Any]:
        """Shapes from ``context`` alone."""
        tokens = jax.ShapeDtypeStruct((self.context,), jnp.int32)
        weights = jax.ShapeDtypeStruct((self.context,), jnp.float32)
        return {"inputs": tokens, "targets": tokens, "asked": weights, "mask": weights}

    def objective(self) -> RecallObjective:
        """Cross-entropy of the answers."""
        return RecallObjective()

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """accuracy and nll (nats) of the answers; chance is 1 / values and log(values)."""
        logits, weights = answer_of(output), batch["asked"] * batch["mask"]
        right = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
        return {
            "accuracy": Mean.of(right, weights),
            "nll": Mean.of(token_nll(logits, batch["targets"]), weights),
        }
