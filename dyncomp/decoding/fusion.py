"""Steering a large language model by what small experts learned: shifts of logits, weighed anew at every token.

One large model P = softmax(large), one small base Q = softmax(base) and T small experts Q_t = softmax(expert_t) share
a vocabulary. The fused model is softmax(large + sum_t alpha_t (expert_t - base)): with alpha fixed, proxy tuning
(arXiv 2401.08565); with alpha found at each step, dynamic logits fusion (arXiv 2406.15480). Everything is float32 and
in log space, row by row: no row or step can influence another. Letters: ``e`` experts, ``c`` grid values.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int

Terms = Literal["both", "from_fused", "from_base"]


@struct.dataclass
class FusionPlan:
    """Which expert steers each row, and how strongly.

    Attributes:
      expert: int32 [b], or any shape.
      alpha: float32 [b].
      mismatch: float32 [b], J at the choice.
    """

    expert: Int[Array, "*b"]
    alpha: Float[Array, "*b"]
    mismatch: Float[Array, "*b"]

    def alphas(self, experts: int) -> Float[Array, "e *b"]:
        """The weights of all experts, one non-zero a row."""
        names = jnp.expand_dims(jnp.arange(experts), tuple(range(1, 1 + self.expert.ndim)))
        chosen = names == self.expert[None]
        return jnp.where(chosen, self.alpha[None], 0.0)


def alpha_grid(stop: float = 2.0, steps: int = 20) -> Float[np.ndarray, "c"]:
    """float32 i * stop / steps, i = 0..steps (the paper: 0..2 by 0.1). Starts at exactly 0; 1 is exactly 1."""
    if stop <= 0 or steps < 1:
        raise DyncompError(f"alpha_grid: stop={stop}, steps={steps}; use stop > 0, steps >= 1")
    return (np.arange(steps + 1) * stop / steps).astype(np.float32)


def logit_shifts(
    base: Float[Array, "b v"],
    experts: Float[Array, "e b v"],
    allowed: Bool[Array, "v"] | None = None,
) -> Float[Array, "e b v"]:
    """expert_t - base, float32; 0 where both are -inf or the token is not allowed (padded vocabularies)."""
    base, experts = base.astype(jnp.float32)[None], experts.astype(jnp.float32)
    shifts = jnp.where(experts == base, 0.0, experts - base)
    return shifts if allowed is None else jnp.where(allowed[None, None], shifts, 0.0)


def fused_logits(
    large: Float[Array, "b v"], shifts: Float[Array, "e b v"], alphas: Float[Array, "e b"]
) -> Float[Array, "b v"]:
    """large + sum_t alpha_t shift_t, float32; ``large`` bit for bit where every alpha is 0 and shifts are finite."""
    added = jnp.sum(alphas[:, :, None] * shifts, axis=0)
    return large.astype(jnp.float32) + added


def kl_divergence(log_p: Float[Array, "*n v"], log_q: Float[Array, "*n v"]) -> Float[Array, "*n"]:
    """KL(p || q) in nats from log-probabilities; tokens that p excludes count nothing."""
    possible = log_p > -jnp.inf
    ratio = jnp.where(possible, log_p - log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * ratio, axis=-1)


def displacement(
    logits: Float[Array, "v"], shift: Float[Array, "v"], alpha: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(KL(moved || original), KL(original || moved)) of softmax(logits) moved by ``alpha * shift``, nats.

    By the closed form (derived, not in the paper): with E over the original, M = log E[exp(alpha shift)],
    KL(moved || original) = alpha E_moved[shift] - M and KL(original || moved) = M - alpha E[shift]. The shift is
    centred at E[shift] first, which changes neither and keeps small values exact. Both grow with alpha >= 0; the
    first is bounded, so it may never reach a target.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    centred = shift - jnp.sum(jnp.exp(log_p) * shift)
    tilted = log_p + alpha * centred
    log_norm = jax.nn.logsumexp(tilted)
    moment = log_norm - jax.nn.logsumexp(log_p)
    moved = jnp.sum(jnp.exp(tilted - log_norm) * centred)
    # Exact zeros, so that an expert that learned nothing ties at every alpha whatever the order of summation.
    moves = (alpha != 0) & jnp.any(shift != shift[0])
    first, second = alpha * moved - moment, moment - alpha * jnp.sum(jnp.exp(log_p) * centred)
    return jnp.where(moves, first, 0.0), jnp.where(moves, second, 0.0)


def mismatch(
    large: Float[Array, "b v"],
    base: Float[Array, "b v"],
    experts: Float[Array, "e b v"],
    grid: Float[Array, "c"],
    *,
    terms: Terms = "both",
    allowed: Bool[Array, "v"] | None = None,
) -> Float[Array, "b e c"]:
    """J of every expert alone at every alpha: how far the large model's displacement is from the experts' own.

    J(t, alpha) = sum over ALL experts s of (KL(fused || P) - KL(Q_s || Q))^2 + (KL(P || fused) - KL(Q || Q_s))^2
    (arXiv 2406.15480, section 3.2 and its multi-expert form; directions as our sheet settles them).

    Args:
      large: raw logits of the large model; likewise ``base`` and ``experts``.
      grid: run-time values of alpha, the first of which wins ties; see `alpha_grid`.
      terms: ``from_fused`` keeps only the first squared term, ``from_base`` only the second (an ablation).
      allowed: tokens that all vocabularies have.

    Raises:
      DyncompError: unknown ``terms``.
    """
    if terms not in ("both", "from_fused", "from_base"):
        raise DyncompError(f"terms={terms!r}: use 'both', 'from_fused' or 'from_base'")
    shifts = logit_shifts(base, experts, allowed)
    if allowed is not None:
        large, base = (jnp.where(allowed[None], x, -jnp.inf) for x in (large, base))
    weights = {"both": (1.0, 1.0), "from_fused": (1.0, 0.0), "from_base": (0.0, 1.0)}[terms]

    def row(large, base, shifts):
        over_experts = jax.vmap(displacement, (None, 0, None))
        targets = over_experts(base, shifts, jnp.float32(1))
        moved = jax.vmap(over_experts, (None, None, 0), 1)(large, shifts, grid)  # two of [e c]
        gaps = [x[:, :, None] - y[None, None, :] for x, y in zip(moved, targets, strict=True)]
        first, second = (jnp.sum(jnp.square(gap), axis=-1) for gap in gaps)
        return weights[0] * first + weights[1] * second

    return jax.vmap(row, (0, 0, 1))(large, base, shifts)


def choose_fusion(
    large: Float[Array, "b v"],
    base: Float[Array, "b v"],
    experts: Float[Array, "e b v"],
    grid: Float[Array, "c"],
    *,
    terms: Terms = "both",
    allowed: Bool[Array, "v"] | None = None,
) -> FusionPlan:
    """The expert and alpha with the smallest J, one expert at a time (arXiv 2406.15480); arguments of `mismatch`.

    The search starts afresh for every row and step (the paper's pseudo-code, as printed, would carry the minimum over
    steps). Ties go to the lowest expert, then to the first grid value. A grid of one value is proxy tuning.
    """
    j = mismatch(large, base, experts, grid, terms=terms, allowed=allowed)
    flat = j.reshape(j.shape[0], -1)
    best = jnp.argmin(flat, axis=-1)
    expert, place = jnp.divmod(best, grid.shape[0])
    return FusionPlan(expert.astype(jnp.int32), grid[place], jnp.min(flat, axis=-1))


def fuse(
    large: Float[Array, "b v"],
    base: Float[Array, "b v"],
    experts: Float[Array, "e b v"],
    plan: FusionPlan,
    *,
    allowed: Bool[Array, "v"] | None = None,
) -> Float[Array, "b v"]:
    """Logits of the fused model under a plan; -inf at tokens that are not allowed. Temperature comes after."""
    fused = fused_logits(large, logit_shifts(base, experts, allowed), plan.alphas(experts.shape[0]))
    return fused if allowed is None else jnp.where(allowed[None], fused, -jnp.inf)


def fused_text_logits(
    large: Float[Array, "b t v"],
    base: Float[Array, "b t v"],
    experts: Float[Array, "e b t v"],
    grid: Float[Array, "c"],
    *,
    terms: Terms = "both",
) -> tuple[Float[Array, "b t v"], Any]:
    """What the fused model says at every position of a given text, and the `FusionPlan` of each (leaves [b t]).

    Logits are of whole forward passes of the models on that text; every position chooses for itself.
    """
    b, t, v = large.shape
    rows = large.reshape(b * t, v), base.reshape(b * t, v), experts.reshape(-1, b * t, v)
    plan = choose_fusion(*rows, grid, terms=terms)
    fused = fuse(*rows, plan).reshape(b, t, v)
    return fused, jax.tree.map(lambda x: x.reshape(b, t), plan)
