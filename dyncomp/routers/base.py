"""The common part of routers that score: logits, noise, what is handed up the layers, and the losses."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes, widened
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float
from dyncomp.routers import losses, noise, scorers

Scorer = Literal["linear", "cosine"]
Noise = Literal["none", "fixed", "learned"]
BELOW = "router_logits"
"""Name, in the state that blocks hand up the depth, of the logits of the router below."""


class Scored(nn.Module):
    """Base of the routers that score experts, in float32 (float64 for such rows). A subclass says how to choose.

    Losses (raw): ``balance`` and ``balance_first`` (two normalisations, `losses.balance_loss`), ``importance``,
    ``entropy``, ``z``; ``imbalance``, which is no loss but a figure to watch (`losses.imbalance`); with noise ``load``;
    with ``balance_weights`` ``heterogeneous``.

    Attributes:
      num_experts: e, those without computation included.
      scorer: "linear" (x W) or "cosine" (`scorers.cosine`).
      residual: add the logits of the layer below (`scorers.GatingResidual`); blocks hand them up.
      jitter: scale the router's input by uniform noise in [1 - jitter, 1 + jitter] while training.
      noise: normal noise on the logits while training: of standard deviation ``noise_std`` / e ("fixed", V-MoE and
        Tutel), or of softplus(x W_n) ("learned", Shazeer et al. 2017, eq. 4).
      logit_std: rescale each row's logits to this standard deviation before choosing; what is handed up is not
        rescaled. None leaves them alone.
      balance_weights: weight of each expert in the heterogeneous loss; empty for no such loss.
      dtypes: routing is float32 whatever they say, float64 for rows of that.
    """

    num_experts: int
    scorer: Scorer = "linear"
    residual: bool = False
    jitter: float = 0.0
    noise: Noise = "none"
    noise_std: float = 1.0
    logit_std: float | None = None
    balance_weights: Sequence[float] = ()
    dtypes: DTypes = DTypes()

    def check(self) -> None:
        """Refuses options that make no sense; called before anything is traced."""
        name = type(self).__name__
        if self.num_experts < 1:
            raise DyncompError(f"{name}.num_experts={self.num_experts}: use 1 or more")
        if self.scorer not in ("linear", "cosine"):
            raise DyncompError(f"{name}.scorer={self.scorer!r}: use 'linear' or 'cosine'")
        if self.noise not in ("none", "fixed", "learned"):
            raise DyncompError(f"{name}.noise={self.noise!r}: use 'none', 'fixed' or 'learned'")
        if not 0 <= self.jitter < 1 or self.noise_std <= 0:
            raise DyncompError(
                f"{name}: jitter={self.jitter} must be in [0, 1) and noise_std={self.noise_std} above 0"
            )
        if len(self.balance_weights) not in (0, self.num_experts):
            raise DyncompError(
                f"{name}: {len(self.balance_weights)} balance_weights for num_experts={self.num_experts}"
            )

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """The plan for given logits; padding is taken out afterwards."""
        raise NotImplementedError

    def probabilities(self, logits: Float[Array, "n e"]) -> Float[Array, "n e"]:
        """What the losses take for the probability of each expert; rows sum to 1."""
        return jax.nn.softmax(logits, axis=-1)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n d"],
        mask: Array | None = None,
        train: bool = False,
        below: dict[str, Array] | None = None,
    ) -> Any:
        """Plan and raw losses; with ``residual`` also what goes to the router above.

        Args:
          x: rows, any float dtype.
          mask: [n], 0 for padding; such rows use no expert and count in no loss.
          train: draws noise.
          below: with ``residual``, ``{"router_logits": float32 [n e]}`` of the layer below (`below_like` at first).
        """
        self.check()
        x = widened(x)
        if train and self.jitter:
            x = noise.jitter(self.make_rng("router"), x, self.jitter)
        clean = getattr(scorers, self.scorer)(self, x, self.num_experts)
        if self.residual:
            layers = scorers.GatingResidual(self.num_experts, name="residual")
            clean = layers(
                clean, self.below_like(x.shape[0])[BELOW] if below is None else below[BELOW]
            )
        logits = clean if self.logit_std is None else noise.unit_scale(clean, self.logit_std)
        std = self._noise_std(x)
        noisy = (
            noise.add(self.make_rng("router"), logits, std) if train and std is not None else logits
        )
        plan = self.choose(noisy, mask, train)
        plan = plan if mask is None else plan.masked(mask)
        found = self._losses(logits, noisy, std, plan, mask)
        return (plan, found, {BELOW: clean}) if self.residual else (plan, found)

    def below_like(self, rows: int) -> dict[str, Array]:
        """What the first layer gets from below: zero logits; nothing without ``residual``."""
        return {BELOW: jnp.zeros((rows, self.num_experts), jnp.float32)} if self.residual else {}

    def _noise_std(self, x: Array) -> Array | None:
        if self.noise == "none":
            return None
        if self.noise == "fixed":
            return jnp.full((1, 1), self.noise_std / self.num_experts, jnp.float32)
        shape = (x.shape[-1], self.num_experts)
        zeros, axes = nn.initializers.zeros_init(), ("embed", "router")
        kernel = param(self, "noise", zeros, shape, axes, x.dtype.name)
        return jax.nn.softplus(jnp.dot(x, widened(kernel)))

    def _losses(
        self, logits: Array, noisy: Array, std: Array | None, plan: RoutePlan, mask: Array | None
    ) -> dict[str, Array]:
        p, clean = self.probabilities(noisy), self.probabilities(logits)
        found = {
            "balance": losses.balance_loss(p, plan, mask),
            "balance_first": losses.balance_loss(p, plan, mask, choices="first"),
            "importance": losses.importance_loss(clean, mask),
            "entropy": losses.entropy_loss(logits, mask),
            "z": losses.z_loss(noisy, mask),
            "imbalance": losses.imbalance(plan, self.num_experts),
        }
        if std is not None:
            k, learned = min(plan.experts.shape[-1], self.num_experts), self.noise == "learned"
            found["load"] = losses.load_loss(logits, noisy, std, k, mask, leave_out=learned)
        if self.balance_weights:
            weights = jnp.asarray(self.balance_weights, jnp.float32)
            found["heterogeneous"] = losses.heterogeneous_loss(p, plan, weights, mask)
        return found

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of scoring one row."""
        e, width = self.num_experts, 256
        flops = 2 * d_model * e if self.scorer == "linear" else 2 * width * (d_model + e)
        flops += 2 * e * e * self.residual + 2 * d_model * e * (self.noise == "learned")
        return {"rows": Cost(flops, 4 * (d_model + e))}
