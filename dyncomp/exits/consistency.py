"""Leave when two successive exits say the same: rules over what exits would do or what they see (arXiv 2411.02359)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float

Distance = Literal["rms", "l2", "mean_abs", "max", "cosine"]


def distance(
    a: Float[Array, "*n d"], b: Float[Array, "*n d"], kind: Distance = "rms"
) -> Float[Array, "*n"]:
    """How far two vectors are from each other, float32.

    ``rms`` is the root of the *mean* square (the released code), ``l2`` the paper's norm, sqrt(d) times larger;
    ``mean_abs`` and ``max`` of the absolute differences; ``cosine`` is 1 - cos.

    Raises:
      DyncompError: unknown ``kind``.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    gap = a - b
    if kind == "rms":
        return jnp.sqrt(jnp.mean(gap * gap, axis=-1))
    if kind == "l2":
        return jnp.sqrt(jnp.sum(gap * gap, axis=-1))
    if kind == "mean_abs":
        return jnp.mean(jnp.abs(gap), axis=-1)
    if kind == "max":
        return jnp.max(jnp.abs(gap), axis=-1)
    if kind == "cosine":
        norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
        return 1.0 - jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.maximum(norms, 1e-24))
    raise DyncompError(f"distance={kind!r}: use 'rms', 'l2', 'mean_abs', 'max' or 'cosine'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyRule:
    """Leave at the first exit whose vector is within ``eta`` of the one before.

    The score is *minus* the distance and the threshold minus eta, so that here too a higher score leaves first and
    `exits.solve_thresholds` serves. +inf holds everyone, -inf lets everyone go. The first exit is compared with what
    the rule is started with.

    Attributes:
      kind: see `distance`.
      first: how many leading numbers are compared (a pose without its gripper); None for all.
      eta: starting value of every exit's bound.
    """

    kind: Distance = "rms"
    first: int | None = None
    eta: float = 0.0

    def __post_init__(self):
        if self.kind not in ("rms", "l2", "mean_abs", "max", "cosine"):
            raise DyncompError(
                f"kind={self.kind!r}: use 'rms', 'l2', 'mean_abs', 'max' or 'cosine'"
            )
        if self.first is not None and self.first < 1:
            raise DyncompError(f"ConsistencyRule.first={self.first}: use 1 or more, or None")

    def initial(self) -> float:
        """Minus eta."""
        return -self.eta

    def score(self, before: Float[Array, "*n a"], now: Float[Array, "*n a"]) -> Float[Array, "*n"]:
        """Minus the distance of the numbers that count."""
        return -distance(before[..., : self.first], now[..., : self.first], self.kind)

    def step(
        self,
        state: Float[Array, "b a"],
        logits: Float[Array, "b a"],
        gate: Array | None,
        threshold: Float[Array, ""],
    ) -> tuple[Float[Array, "b a"], Bool[Array, "b"], Float[Array, "b"]]:
        """Compares one exit's vector (``logits``) with the one before (``state``), which it then replaces."""
        score = self.score(state, logits)
        return logits, score >= threshold, score
