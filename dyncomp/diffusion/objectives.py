"""The objective of a denoiser with exits: L_simple + lambda L_u + beta L_UAL (arXiv 2309.17074 and its released code).

It takes the output of `models.ExitingDenoiser`: ``inner`` [x b ...] predictions of the noise after every block, the
last one the network's own, ``certainty`` [x b ...] and ``noise`` [b ...].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float
from dyncomp.diffusion.certainty import (
    Weighting,
    certainty_errors,
    squared_errors,
    weighted_layers,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingObjective:
    """Mean squared error of the noise, the probes' loss, and the layers' losses weighted by certainty.

    Attributes:
      certainty_weight: lambda, of L_u; it moves the probes alone.
      layers_weight: beta, of L_UAL.
      weighting: see `certainty.weighted_layers`.
      detach_weights: hold L_UAL's weights constant. The released code does not: its probes are also pushed towards
        layers that are good.
      over_layers: L_u is the mean over layers (released code) or the sum (paper).
    """

    certainty_weight: float = 1.0
    layers_weight: float = 1.0
    weighting: Weighting = "official"
    detach_weights: bool = False
    over_layers: Literal["mean", "sum"] = "mean"

    def __post_init__(self):
        if self.weighting not in ("official", "paper", "uniform"):
            raise DyncompError(
                f"weighting={self.weighting!r}: use 'official', 'paper' or 'uniform'"
            )
        if self.over_layers not in ("mean", "sum"):
            raise DyncompError(f"over_layers={self.over_layers!r}: use 'mean' or 'sum'")
        if self.certainty_weight < 0 or self.layers_weight < 0:
            raise DyncompError(
                f"DenoisingObjective: certainty_weight={self.certainty_weight},"
                f" layers_weight={self.layers_weight}; use 0 or more"
            )

    def __call__(
        self, output: Mapping[str, Any], aux: Any, batch: Mapping[str, Any], step: Any
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """Loss, and its parts as metrics; a part of weight 0 is not computed."""
        inner, noise = output["inner"], output["noise"]
        mask = jnp.asarray(batch["mask"], jnp.float32)
        simple = Mean.of(squared_errors(inner[-1:], noise)[0], mask)
        loss = jnp.asarray(simple.total / jnp.maximum(simple.count, 1.0))
        metrics = {"simple": simple}
        if self.certainty_weight:
            part = self.probes(output, mask)
            loss, metrics["certainty"] = loss + self.certainty_weight * part, Mean.of(part)
        if self.layers_weight:
            part = self.layers(output, mask)
            loss, metrics["layers"] = loss + self.layers_weight * part, Mean.of(part)
        return loss, metrics

    def probes(self, output: Mapping[str, Any], mask: Float[Array, "b"]) -> Float[Array, ""]:
        """L_u. The targets are constant and the probes' inputs too, so nothing else moves."""
        each = certainty_errors(output["certainty"], output["inner"], output["noise"])
        layers = jnp.sum(each * mask[None], axis=1) / jnp.maximum(jnp.sum(mask), 1.0)
        return jnp.mean(layers) if self.over_layers == "mean" else jnp.sum(layers)

    def layers(self, output: Mapping[str, Any], mask: Float[Array, "b"]) -> Float[Array, ""]:
        """L_UAL."""
        certainty = output["certainty"]
        certainty = lax.stop_gradient(certainty) if self.detach_weights else certainty
        return weighted_layers(certainty, output["inner"], output["noise"], mask, self.weighting)
