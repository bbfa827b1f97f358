"""Exits within a denoising step: probes that say how good a prediction of the noise would be here, and the rule.

The signal is *certainty*: the released code's probes predict 1 - tanh|error| of every pixel (arXiv 2309.17074 writes
its complement, uncertainty), so a step stops where the mean of the map is above a threshold.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float, Int

ProbeTime = Literal["mixed", "concatenated"]
Weighting = Literal["official", "paper", "uniform"]


class CertaintyProbes(nn.Module):
    """One linear map and a sigmoid after every block: tokens to a map of certainty, in float32.

    The tokens are held constant, so probes never move the network.

    Attributes:
      exits: x, blocks with a probe.
      outputs: o, values a token (patch * patch * channels).
      time: what a probe knows of the time. "mixed": what attention mixed into the tokens from the time token (the
        released code). "concatenated": the time embedding stands beside every token (the paper's formula).
    """

    exits: int
    outputs: int
    time: ProbeTime = "mixed"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.time not in ("mixed", "concatenated"):
            raise DyncompError(f"CertaintyProbes.time={self.time!r}: use 'mixed' or 'concatenated'")
        if self.exits < 1 or self.outputs < 1:
            raise DyncompError(
                f"CertaintyProbes: exits={self.exits}, outputs={self.outputs}; use 1 or more"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "*x b t d"], times: Float[Array, "b d"], index: int | None = None
    ) -> Float[Array, "*x b t o"]:
        """Certainty in (0, 1).

        Args:
          tokens: of the patches, [x b t d] of all exits or [b t d] of exit ``index``.
          times: embedding of the time; read with ``time="concatenated"`` only.
          index: static.
        """
        x = lax.stop_gradient(tokens).astype(jnp.float32)
        x = x if index is None else x[None]
        if self.time == "concatenated":
            beside = jnp.broadcast_to(times.astype(jnp.float32)[None, :, None], x.shape)
            x = jnp.concatenate([x, beside], axis=-1)
        small, zeros = nn.initializers.normal(0.02), nn.initializers.zeros_init()
        shape, dtype = (self.exits, x.shape[-1], self.outputs), self.dtypes.param
        kernel = param(self, "kernel", small, shape, ("exits", "embed", None), dtype)
        bias = param(self, "bias", zeros, (self.exits, self.outputs), ("exits", None), dtype)
        if index is not None:
            kernel, bias = kernel[index : index + 1], bias[index : index + 1]
        raw = jnp.einsum("xbtd,xdo->xbto", x, kernel.astype(jnp.float32))
        found = jax.nn.sigmoid(raw + bias.astype(jnp.float32)[:, None, None])
        return found if index is None else found[0]

    def cost(self, d_model: int) -> Cost:
        """Price of one token at one exit."""
        width = d_model * (2 if self.time == "concatenated" else 1)
        return Cost(2 * width * self.outputs, 4 * (width + self.outputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertaintyRule:
    """Stop at the first exit whose mean certainty is above the threshold; an `exits.ExitRule`.

    Attributes:
      threshold: certainty; an uncertainty threshold of the paper is one minus this. 1 never stops.
      patience: how many of the first exits' crossings are needed to stop at one of them (2 in the released code's
        models without text). They need not be successive.
      patient_exits: how many exits are first ones (there: those before the middle block).
    """

    threshold: float = 0.92
    patience: int = 1
    patient_exits: int = 0

    def __post_init__(self):
        if self.patience < 1 or self.patient_exits < 0:
            raise DyncompError(
                f"CertaintyRule: patience={self.patience}, patient_exits={self.patient_exits};"
                " use patience >= 1 and patient_exits >= 0"
            )

    def initial(self) -> float:
        """The certainty to exceed."""
        return self.threshold

    def start(self, batch: int) -> tuple[Int[Array, "b"], Int[Array, "b"]]:
        """(exits passed, crossings among the first ones): every denoising step counts anew."""
        return jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)

    def step(self, state: Any, logits: Array, gate: Array, threshold: Array):
        """Looks at one exit: ``gate`` [b] is the mean of its map; ``logits`` are not read."""
        passed, crossings = state
        crossed = gate > threshold
        crossings = crossings + crossed.astype(jnp.int32)
        leave = jnp.where(passed < self.patient_exits, crossings >= self.patience, crossed)
        return (passed + 1, crossings), leave, gate


def certainty_target(
    inner: Float[Array, "x b *s"], noise: Float[Array, "b *s"]
) -> Float[Array, "x b *s"]:
    """1 - tanh|g_i - eps| of every value, held constant: 1 where a prediction is perfect."""
    return lax.stop_gradient(1.0 - jnp.tanh(jnp.abs(inner - noise[None])))


def squared_errors(
    inner: Float[Array, "x b *s"], noise: Float[Array, "b *s"]
) -> Float[Array, "x b"]:
    """Mean over an image of (g_i - eps)^2."""
    error = (inner - noise[None]).astype(jnp.float32)
    return _each(error * error)


def certainty_errors(
    certainty: Float[Array, "x b *s"], inner: Float[Array, "x b *s"], noise: Float[Array, "b *s"]
) -> Float[Array, "x b"]:
    """Mean over an image of (v_i - (1 - tanh|g_i - eps|))^2: what L_u folds."""
    error = certainty - certainty_target(inner, noise)
    return _each(error * error)


def layer_weights(certainty: Float[Array, "x b *s"], mask: Float[Array, "b"]) -> Float[Array, "x"]:
    """Mean certainty of each layer over batch and image, normalised to a sum of 1 (released code)."""
    means = jnp.sum(_each(certainty) * mask[None], axis=1) / jnp.maximum(jnp.sum(mask), 1.0)
    return means / jnp.sum(means)


def weighted_layers(
    certainty: Float[Array, "x b *s"],
    inner: Float[Array, "x b *s"],
    noise: Float[Array, "b *s"],
    mask: Float[Array, "b"],
    weighting: Weighting,
) -> Float[Array, ""]:
    """L_UAL: the layers' errors, weighted by certainty.

    ``official``: sum_i w_i mean (g_i - eps)^2 with `layer_weights`. ``paper``: sum_i mean v_i (g_i - eps)^2, value by
    value and not normalised (our reading of sum_i (1 - u_i) |g_i - eps|^2). ``uniform``: the mean over layers.

    Raises:
      DyncompError: unknown ``weighting``.
    """
    average = lambda each: jnp.sum(each * mask[None], axis=1) / jnp.maximum(jnp.sum(mask), 1.0)
    if weighting == "paper":
        error = (inner - noise[None]).astype(jnp.float32)
        return jnp.sum(average(_each(certainty * error * error)))
    errors = average(squared_errors(inner, noise))
    if weighting == "uniform":
        return jnp.mean(errors)
    if weighting != "official":
        raise DyncompError(f"weighting={weighting!r}: use 'official', 'paper' or 'uniform'")
    return jnp.sum(layer_weights(certainty, mask) * errors)


def _each(values: Float[Array, "x b *s"]) -> Float[Array, "x b"]:
    return jnp.mean(values, axis=tuple(range(2, values.ndim)))
