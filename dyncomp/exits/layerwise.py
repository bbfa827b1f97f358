"""A task loss at every layer of a decoder, so that each can be the last (MuE, arXiv 2211.11152)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float, Int

Weights = Literal["uniform", "last"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseObjective:
    """L = mean (or sum) over layers i of CE(head(norm(D_i)), y), nats a word; the norm and the head are shared.

    Coefficients beyond equal ones were not found. The encoder has no loss of its own.

    Attributes:
      weights: ``uniform`` trains every layer; ``last`` is ordinary training of the last one.
      reduce: over layers; "sum" is "mean" times their number, so a step with Adam differs in clipping and decay only.
    """

    weights: Weights = "uniform"
    reduce: Literal["mean", "sum"] = "mean"

    def __post_init__(self):
        if self.weights not in ("uniform", "last"):
            raise DyncompError(
                f"LayerwiseObjective.weights={self.weights!r}: use 'uniform' or 'last'"
            )
        if self.reduce not in ("mean", "sum"):
            raise DyncompError(f"LayerwiseObjective.reduce={self.reduce!r}: use 'mean' or 'sum'")

    def __call__(
        self, output: Mapping[str, Array], aux: Any, batch: Mapping[str, Any], step: Any
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The loss, and nll and word accuracy of every layer that trains.

        A model that was not run for training gives no ``layers``; then its final logits are judged.
        """
        layers = output["layers"] if "layers" in output else output["final"][None]
        layers = layers[-1:] if self.weights == "last" else layers
        mask, targets = jnp.asarray(batch["mask"]), jnp.asarray(batch["targets"])
        each = layer_losses(layers, targets, mask)
        right = jnp.argmax(layers, axis=-1) == targets[None]
        found = {"nll": Mean.of(each[-1])}
        found |= {f"words_layer_{i}": Mean.of(row, mask) for i, row in enumerate(right)}
        return (jnp.mean if self.reduce == "mean" else jnp.sum)(each), found


def layer_losses(
    layers: Float[Array, "l b t v"], targets: Int[Array, "b t"], mask: Float[Array, "b t"]
) -> Float[Array, "l"]:
    """Cross-entropy of every layer, nats a word that counts."""
    tiled = jnp.broadcast_to(targets, layers.shape[:-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(layers.astype(jnp.float32), tiled)
    return jnp.sum(nll * mask[None], axis=(1, 2)) / jnp.maximum(jnp.sum(mask), 1.0)
