"""What happens to exits between training steps: positive weights, early stopping of heads, a calibrated threshold.

All controllers (`dyncomp.training.controller.Controller`) look at held-out data through the compiled model; what they
remember is in the train state.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int
from dyncomp.exits.objectives import JointExitObjective
from dyncomp.exits.oracle import cross_entropy
from dyncomp.exits.selection import cheapest_threshold

Forward = Callable[[Any], tuple[Any, Any]]


def positive_weights(
    best: Int[np.ndarray, "n"], exits: int, *, limit: float = 5.0
) -> Float[np.ndarray, "y"]:
    """min((N - n_l) / n_l, limit) with n_l = max(#{t* = l}, 0.1) over N validation examples (JEI-DNN's code)."""
    counts = np.maximum(np.bincount(best, minlength=exits + 1)[:exits].astype(np.float64), 0.1)
    return np.minimum((len(best) - counts) / counts, limit).astype(np.float32)


@dataclasses.dataclass
class HeadPatience:
    """Dynamic warm-up: each head keeps its best weights, and is frozen once it stops improving.

    Attributes:
      patience: validations without improvement before a head is frozen.
      best_loss: float32 [y], lowest validation loss of each head.
      waited: int32 [y], validations since then.
      best: parameters of all heads as of each head's best validation (leaves [y ...]); None before the first.
    """

    exits: int
    patience: int = 2
    best_loss: Any = None
    waited: Any = None
    best: Any = None

    def __post_init__(self):
        if self.exits < 1 or self.patience < 1:
            raise DyncompError(
                f"HeadPatience: exits={self.exits}, patience={self.patience}; use >= 1"
            )
        if self.best_loss is None:
            self.best_loss = np.full(self.exits, np.inf, np.float32)
            self.waited = np.zeros(self.exits, np.int32)
        self.best_loss, self.waited = np.asarray(self.best_loss), np.asarray(self.waited)

    @property
    def frozen(self) -> np.ndarray:
        """bool [y]."""
        return self.waited >= self.patience

    def update(self, losses: Float[np.ndarray, "y"], heads: Any) -> Any:
        """One validation: the heads (leaves [y ...]) with every frozen one back at its best weights, for good."""
        losses, live = losses.astype(np.float32), ~self.frozen
        better = (losses < self.best_loss) & live
        self.best_loss = np.where(better, losses, self.best_loss)
        self.waited = np.where(live, np.where(better, 0, self.waited + 1), self.waited)
        if self.best is None:
            self.best = heads
        self.best = jax.tree.map(lambda old, new: _pick(better, new, old), self.best, heads)
        return jax.tree.map(lambda old, new: _pick(self.frozen, old, new), self.best, heads)

    def restore(self) -> Any:
        """The best weights of every head (at the end of the warm-up)."""
        return self.best


def _pick(chosen: np.ndarray, new: Any, old: Any) -> Any:
    """Rows of ``new`` where ``chosen`` [y], else of ``old``."""
    return jnp.where(chosen.reshape(-1, *([1] * (new.ndim - 1))), new, old)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadWarmUp:
    """Controller of the stage that trains heads alone: `HeadPatience` on the validation cross-entropy of each.

    The model's parameters have the heads at ``bank/heads``. A stage cannot end early: once all heads are frozen,
    every call puts them back.

    Attributes:
      until: global step of the last call; there every head goes back to its best.
      patience: see `HeadPatience`.
      batch_size: examples of the validation split at once.
    """

    until: int
    patience: int = 2
    batch_size: int = 500

    def __post_init__(self):
        if self.until < 1 or self.batch_size < 1:
            raise DyncompError(
                f"HeadWarmUp: until={self.until}, batch_size={self.batch_size}; use >= 1"
            )

    def init(self, state: Any) -> dict[str, Any]:
        """Nothing seen yet: ``best_loss`` [y], ``waited`` [y] and ``best`` (the heads as they are)."""
        heads = state.params["bank"]["heads"]
        exits = jax.tree.leaves(heads)[0].shape[0]
        start = HeadPatience(exits, self.patience)
        return {
            "best_loss": jnp.asarray(start.best_loss),
            "waited": jnp.asarray(start.waited),
            "best": jax.tree.map(jnp.copy, heads),
        }

    def __call__(self, state: Any, forward: Forward, task: Any, step: int) -> Any:
        """The state with frozen heads at their best weights."""
        memory, bank = state.controller, state.params["bank"]
        losses = np.concatenate(
            [
                np.asarray(cross_entropy(output["logits"][:-1], batch["targets"]))[:, real]
                for output, batch, real in batches(forward, task, self.batch_size)
            ],
            axis=1,
        )
        tracked = HeadPatience(len(losses), self.patience, **memory)
        heads = tracked.update(losses.mean(axis=1), bank["heads"])
        if step >= self.until:
            heads = tracked.restore()
        kept = {name: getattr(tracked, name) for name in memory}
        params = {**state.params, "bank": {**bank, "heads": heads}}
        return state.replace(params=params, controller=kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositiveWeights:
    """Controller of the joint stage: renews the control ``pos_weight`` from where t* falls on validation data.

    Attributes:
      objective: says what t* is.
      limit: see `positive_weights`.
      batch_size: examples of the validation split at once.
    """

    objective: JointExitObjective
    limit: float = 5.0
    batch_size: int = 500

    def init(self, state: Any) -> None:
        """It remembers nothing."""

    def __call__(self, state: Any, forward: Forward, task: Any, step: int) -> Any:
        """The state with new positive weights."""
        best = np.concatenate(
            [
                np.asarray(self.objective.best(output, batch))[real]
                for output, batch, real in batches(forward, task, self.batch_size)
            ]
        )
        exits = state.controls["pos_weight"].shape[0]
        weights = jnp.asarray(positive_weights(best, exits, limit=self.limit))
        return state.replace(controls={**state.controls, "pos_weight": weights})


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepAccuracy:
    """Controller that solves the control ``threshold``, one for all exits, on the calibration split.

    It becomes the cheapest one at which at most ``tolerance`` of the accuracy of the last exit is lost
    (`cheapest_threshold`). The model's output has ``scores`` [x b], ``logits`` [x b c] and ``costs`` [x], cumulative.

    Attributes:
      tolerance: as a share of the examples, 0.001 for a tenth of a point.
      batch_size: examples of the split at once.
    """

    tolerance: float = 0.0
    batch_size: int = 500

    def init(self, state: Any) -> None:
        """It remembers nothing."""

    def __call__(self, state: Any, forward: Forward, task: Any, step: int) -> Any:
        """The state with another threshold."""
        scores, right, costs = [], [], None
        for output, batch, real in batches(forward, task, self.batch_size, "calibration"):
            scores.append(np.asarray(output["scores"]).T[real])
            said = np.asarray(jnp.argmax(output["logits"], axis=-1))
            right.append((said == np.asarray(batch["targets"])).T[real])
            costs = np.asarray(output["costs"])
        assert costs is not None, "the calibration split is empty"
        found = cheapest_threshold(
            np.concatenate(scores), np.concatenate(right), costs, tolerance=self.tolerance
        )
        value = jnp.full_like(state.controls["threshold"], found.threshold)
        return state.replace(controls={**state.controls, "threshold": value})


def batches(
    forward: Forward, task: Any, size: int, split: str = "validation"
) -> Iterator[tuple[Any, Any, Any]]:
    """(output, batch, which rows are real [b] bool) over a split, in batches of one size."""
    source = task.source(split)
    total = len(source)
    for start in range(0, total, size):
        rows = np.arange(start, start + size)
        real = rows < total
        batch = source.batch(np.minimum(rows, total - 1))
        kept = real.astype(np.float32).reshape(-1, *[1] * (batch["mask"].ndim - 1))
        batch = {**batch, "mask": batch["mask"] * kept}
        output, _ = forward(batch)
        yield output, {**batch, "targets": jnp.asarray(batch["targets"])}, real
