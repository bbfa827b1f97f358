"""All exits learn the labels and, but for the last, what the last one says (Dynamic Perceiver, arXiv 2306.11248)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float, Int
from dyncomp.exits.objectives import accuracies, weighted_mean

Form = Literal["paper", "code"]


def soft_targets(
    targets: Int[Array | np.ndarray, "b"] | Float[Array | np.ndarray, "b c"],
    classes: int,
    smoothing: float = 0.0,
) -> Float[Array, "b c"]:
    """Labels (or distributions over classes, as mixup makes them) with ``smoothing`` of their mass spread evenly."""
    labels = jnp.asarray(targets)
    hot = jax.nn.one_hot(labels, classes, dtype=jnp.float32) if labels.ndim == 1 else labels
    return (1.0 - smoothing) * hot + smoothing / classes


def exit_terms(
    logits: Float[Array, "x b c"], targets: Float[Array, "b c"], temperature: float = 1.0
) -> tuple[Float[Array, "x b"], Float[Array, "y b"]]:
    """Cross-entropy of every exit, and T^2 KL(softmax(sg(last) / T) || softmax(exit / T)) of all but the last; nats.

    The last exit is the teacher and gets no gradient from the second term.
    """
    logits = logits.astype(jnp.float32)
    ce = -jnp.sum(targets[None] * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    cold = jax.nn.log_softmax(logits / temperature, axis=-1)
    teacher = lax.stop_gradient(cold[-1])[None]
    kl = jnp.sum(jnp.exp(teacher) * (teacher - cold[:-1]), axis=-1)
    return ce, temperature**2 * kl


def combined(
    terms: tuple[Float[Array, "x b"], Float[Array, "y b"]],
    hard: Float[Array | np.ndarray, "x"],
    soft: Float[Array | np.ndarray, "y"],
) -> Float[Array, "b"]:
    """Sum over exits of ``hard`` times cross-entropy plus ``soft`` times divergence."""
    ce, kl = terms
    return jnp.sum(hard[:, None] * ce, axis=0) + jnp.sum(soft[:, None] * kl, axis=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilledExitObjective:
    """alpha CE + (1 - alpha) KL(last || exit) for every early exit, CE for the last; mean over the batch.

    Attributes:
      form: ``code`` gives the early exit before the last (the CNN's own classifier) cross-entropy with weight 1, as the
        released training does; ``paper`` alpha, as all others.
      alpha: share of the labels.
      temperature: T. The released commands use 1 (its default is 4).
      label_smoothing: in [0, 1).
    """

    form: Form = "paper"
    alpha: float = 0.5
    temperature: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        if self.form not in ("paper", "code"):
            raise DyncompError(f"form={self.form!r}: use 'paper' or 'code'")
        if not 0 <= self.alpha <= 1 or self.temperature <= 0 or not 0 <= self.label_smoothing < 1:
            raise DyncompError(
                f"alpha={self.alpha}, temperature={self.temperature}, label_smoothing={self.label_smoothing}:"
                " use [0, 1], > 0 and [0, 1)"
            )

    def weights(self, exits: int) -> tuple[Float[np.ndarray, "x"], Float[np.ndarray, "y"]]:
        """Of the cross-entropies and of the divergences, for ``exits`` classifiers, the last included."""
        hard = np.full(exits, self.alpha, np.float32)
        hard[-1 if self.form == "paper" else -2 :] = 1.0
        return hard, np.full(exits - 1, 1.0 - self.alpha, np.float32)

    def __call__(self, output: Mapping[str, Array], aux: Any, batch: Mapping[str, Any], step: Any):
        """Loss and the accuracy of every exit; ``targets`` int32 [b] or distributions float32 [b c]."""
        logits = output["logits"]
        targets = soft_targets(batch["targets"], logits.shape[-1], self.label_smoothing)
        terms = exit_terms(logits, targets, self.temperature)
        loss = weighted_mean(combined(terms, *self.weights(len(logits))), batch["mask"])
        labels = jnp.argmax(targets, axis=-1)
        metrics = accuracies(output, {**batch, "targets": labels})
        metrics["ce"] = Mean.of(terms[0], batch["mask"][None])
        metrics["kl"] = Mean.of(terms[1], batch["mask"][None])
        return loss, metrics
