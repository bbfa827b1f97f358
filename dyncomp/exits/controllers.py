"""What happens to exits between training steps: positive weights from validation, per-head early stopping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Float, Int


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
      best_loss: [y], lowest validation loss of each head.
      waited: [y], validations since then.
      best: parameters of all heads as of each head's best validation (leaves [y ...]).
    """

    exits: int
    patience: int = 2

    def __post_init__(self):
        if self.exits < 1 or self.patience < 1:
            raise DyncompError(
                f"HeadPatience: exits={self.exits}, patience={self.patience}; use >= 1"
            )
        self.best_loss = np.full(self.exits, np.inf)
        self.waited = np.zeros(self.exits, int)
        self.best: Any = None

    @property
    def frozen(self) -> np.ndarray:
        """bool [y]."""
        return self.waited >= self.patience

    def update(self, losses: Float[np.ndarray, "y"], heads: Any) -> Any:
        """One validation: the heads (leaves [y ...]) with every frozen one back at its best weights, for good."""
        better = (np.asarray(losses) < self.best_loss) & ~self.frozen
        live = ~self.frozen
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
