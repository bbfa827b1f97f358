"""Objectives: cross-entropy plus weighted auxiliary losses. Softmax is float32 or more."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dyncomp.core import budget
from dyncomp.core.aux import Aux, losses_by_name
from dyncomp.core.dtypes import widened
from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float, Int

Reduce = Literal["mean", "sum"]
Answer = Literal["emitted", "final"]


def check_reduce(reduce: str) -> None:
    """Refuses an unknown way to fold the layers of a loss."""
    if reduce not in ("mean", "sum"):
        raise DyncompError(f"aux_reduce={reduce!r}: use 'mean' or 'sum'")


def weighted_aux(
    aux: Aux, weights: Mapping[str, float], reduce: Reduce
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """Weighted sum of the auxiliary losses, each averaged or summed over layers; and their plain values.

    Raises:
      DyncompError: a weight names a loss that no module reports.
    """
    named = {name: jnp.concatenate(values) for name, values in losses_by_name(aux.losses).items()}
    unknown = [name for name in weights if name not in named]
    if unknown:
        raise DyncompError(
            f"aux_weights names {unknown[0]!r}, but the model reports {sorted(named) or 'no losses'}"
        )
    fold = jnp.mean if reduce == "mean" else jnp.sum
    total = sum((weight * fold(named[name]) for name, weight in weights.items()), jnp.float32(0))
    return total, {name: Mean.of(fold(values)) for name, values in named.items()}


def budget_losses(aux: Aux, budgets: Mapping[str, Sequence[float]]) -> Float[Array, ""]:
    """Sum over budgets of weight * (mean over layers of the value - target)^2.

    Raises:
      DyncompError: a budget names a value that no module reports.
    """
    named = {name: jnp.concatenate(values) for name, values in losses_by_name(aux.losses).items()}
    total = jnp.float32(0)
    for name, (target, weight) in budgets.items():
        if name not in named:
            raise DyncompError(
                f"budgets names {name!r}, but the model reports {sorted(named) or 'no losses'}"
            )
        total = total + weight * budget.target_loss(jnp.mean(named[name]), target)
    return total


def token_nll(
    logits: Float[Array, "*n v"], targets: Int[Array | np.ndarray, "*n"]
) -> Float[Array, "*n"]:
    """Negative log-likelihood in nats, float32 or more."""
    labels = jnp.asarray(targets)
    return optax.softmax_cross_entropy_with_integer_labels(widened(logits), labels)


@dataclasses.dataclass(frozen=True)
class LMObjective:
    """Mean next-token cross-entropy in nats plus auxiliary losses.

    Attributes:
      aux_weights: weight of each named auxiliary loss; unnamed ones are only reported.
      aux_reduce: average or sum a loss over layers (the sheets often do not say; default mean).
      budgets: auxiliary value -> (target, weight): adds weight * (mean over layers - target)^2, one budget for all
        layers together, so that layers may specialise.
      final_weight: weight of the cross-entropy of ``final``, where a model gives its full depth beside what it emits.
      z_loss: weight of the mean squared log-partition of the output softmax (PaLM, Chowdhery et al. 2022, sec. 5:
        1e-4); 0 leaves it out.
    """

    aux_weights: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    aux_reduce: Reduce = "mean"
    budgets: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict, hash=False)
    z_loss: float = 0.0
    final_weight: float = 0.0

    def __post_init__(self):
        check_reduce(self.aux_reduce)
        if wrong := [name for name, pair in self.budgets.items() if len(pair) != 2]:
            raise DyncompError(f"LMObjective.budgets[{wrong[0]!r}]: give (target, weight)")

    def __call__(
        self,
        output: Float[Array, "b t v"] | Mapping[str, Any],
        aux: Aux,
        batch: Mapping[str, Any],
        step: Any,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Loss, and the metrics nll (nats a token), output_z if asked for, and every auxiliary loss.

        A model may answer the last positions only (`at_answers`).
        """
        whole, output = output, answer_of(output)
        batch = at_answers(batch, output)
        nll = Mean.of(token_nll(output, batch["targets"]), batch["mask"])
        extra, metrics = weighted_aux(aux, self.aux_weights, self.aux_reduce)
        extra = extra + budget_losses(aux, self.budgets)
        loss = jnp.asarray(nll.total / jnp.maximum(nll.count, 1.0) + extra)
        if self.z_loss:
            log_z = jax.nn.logsumexp(widened(output), axis=-1)
            metrics["output_z"] = Mean.of(jnp.square(log_z), batch["mask"])
            loss = loss + self.z_loss * metrics["output_z"].total / jnp.maximum(nll.count, 1.0)
        if self.final_weight:
            final = token_nll(answer_of(whole, "final"), batch["targets"])
            metrics["nll_final"] = Mean.of(final, batch["mask"])
            share = metrics["nll_final"].total / jnp.maximum(nll.count, 1.0)
            loss = loss + self.final_weight * share
        return loss, {"nll": nll, **metrics}


def at_answers(batch: Mapping[str, Any], logits: Float[Array, "b t v"]) -> dict[str, Any]:
    """``batch`` with targets, mask and bytes of the last positions, as many as there are logits.

    So a model of prompts and responses answers its responses and is judged by those.
    """
    answered = logits.shape[1]
    cut = {
        name: batch[name][:, -answered:] for name in ("targets", "mask", "bytes") if name in batch
    }
    return {**batch, **cut}


def answer_of(
    output: Float[Array, "b *t c"] | Mapping[str, Any], which: Answer = "emitted"
) -> Float[Array, "b *t c"]:
    """The logits to judge: ``output`` itself, or entry ``which`` of a model that may leave early.

    ``emitted`` are the logits each example leaves with, ``final`` those after the last layer.
    """
    return output[which] if isinstance(output, Mapping) else output


@dataclasses.dataclass(frozen=True)
class ClassificationObjective:
    """Mean cross-entropy over examples, or over all their tokens (dense prediction), plus auxiliary losses.

    Attributes:
      label_smoothing: mass spread evenly over classes, in [0, 1).
      answer: which logits are trained where a model gives several, see `answer_of`.
      aux_weights, aux_reduce: as in `LMObjective`.
    """

    label_smoothing: float = 0.0
    aux_weights: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    aux_reduce: Reduce = "mean"
    answer: Answer = "emitted"

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise DyncompError(f"label_smoothing={self.label_smoothing}: use [0, 1)")
        if self.answer not in ("emitted", "final"):
            raise DyncompError(f"answer={self.answer!r}: use 'emitted' or 'final'")
        check_reduce(self.aux_reduce)

    def __call__(
        self,
        output: Float[Array, "b *t c"] | Mapping[str, Any],
        aux: Aux,
        batch: Mapping[str, Any],
        step: Any,
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Loss and the metrics of `classification_metrics` and every auxiliary loss."""
        logits = widened(answer_of(output, self.answer))
        nll = token_nll(logits, batch["targets"])
        uniform = -jnp.mean(jax.nn.log_softmax(logits, axis=-1), axis=-1)
        smooth = (1 - self.label_smoothing) * nll + self.label_smoothing * uniform
        mean = Mean.of(smooth, each(batch["mask"], smooth))
        extra, metrics = weighted_aux(aux, self.aux_weights, self.aux_reduce)
        loss = jnp.asarray(mean.total / jnp.maximum(mean.count, 1.0) + extra)
        return loss, {**classification_metrics(output, batch), **metrics}


def each(mask: Array | np.ndarray, like: Array) -> Array:
    """A mask [b] or [b t] as weights of ``like`` [b ...]: every token of a real example counts."""
    return jnp.broadcast_to(
        jnp.reshape(mask, mask.shape + (1,) * (like.ndim - mask.ndim)), like.shape
    )


def classification_metrics(
    output: Float[Array, "b *t c"] | Mapping[str, Any], batch: Mapping[str, Any]
) -> dict[str, Mean]:
    """Accuracy and negative log-likelihood (nats) over real examples, of the answer each leaves with.

    A model that may leave early also gets ``accuracy_final``, of its last layer on all examples.
    """
    mean = lambda values: Mean.of(values, each(batch["mask"], values))
    right = lambda logits: mean(jnp.argmax(logits, axis=-1) == batch["targets"])
    logits = answer_of(output)
    found = {"accuracy": right(logits), "nll": mean(token_nll(logits, batch["targets"]))}
    if isinstance(output, Mapping):
        found["accuracy_final"] = right(answer_of(output, "final"))
    return found
