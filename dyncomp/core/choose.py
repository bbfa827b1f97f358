"""Choices: pure functions from scores to plans. Never Python control flow on traced values.

All ties resolve to the lower index (stable sorts), so a plan is reproducible. Scores are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import ExitPlan, KeepPlan, RoutePlan
from dyncomp.core.typing import Array, Bool, Float, Int, Key


def ranked(scores: Float[Array, "n e"]) -> tuple[Float[Array, "n e"], Int[Array, "n e"]]:
    """Scores in descending order and the alternatives they belong to; stable."""
    order = jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)
    return jnp.take_along_axis(scores, order, axis=-1), order


def top_k(scores: Float[Array, "n e"], k: int, *, renormalize: bool = False) -> RoutePlan:
    """The k highest scores of each row (Shazeer et al. 2017, eq. 5, on given probabilities).

    Args:
      scores: float32 [n e]; the combine weights are the chosen scores.
      k: static, 1 <= k <= e.
      renormalize: divide the chosen scores by their sum.

    Raises:
      DyncompError: k is out of range.
    """
    check_slots(k, scores.shape[-1])
    experts = _highest(scores, k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return RoutePlan(experts, weights, jnp.ones(weights.shape, bool))


def top_p(
    probabilities: Float[Array, "n e"], p: Float[Array, ""], *, max_slots: int | None = None
) -> RoutePlan:
    """The smallest set of alternatives whose probability mass exceeds p (arXiv 2403.07652, eq. 3-5).

    A sorted position stays iff the mass ranked strictly above it is <= p, so the alternative that crosses the
    threshold is included and at least one stays. From p = 1 on all stay. Weights are the raw probabilities.

    Args:
      probabilities: float32 [n e], rows sum to 1.
      p: run-time threshold.
      max_slots: static bound on the slots of the plan (default e, which never truncates).
    """
    total = probabilities.shape[-1]
    slots = total if max_slots is None else max_slots
    check_slots(slots, total)
    weights, experts = ranked(probabilities)
    above = jnp.pad(jnp.cumsum(weights, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    # A float32 cumulative sum can pass 1 early, so p >= 1 is told apart instead of compared.
    keep = ((above <= p) | (p >= 1.0))[:, :slots]
    weights, experts = weights[:, :slots], experts[:, :slots]
    return RoutePlan(experts, jnp.where(keep, weights, 0.0), keep)


def threshold(scores: Float[Array, "n e"], tau: Float[Array, ""]) -> RoutePlan:
    """All alternatives whose score is at least ``tau``; possibly none."""
    weights, experts = ranked(scores)
    keep = weights >= tau
    return RoutePlan(experts, jnp.where(keep, weights, 0.0), keep)


def expert_choice(
    scores: Float[Array, "n e"], slots: int, allowed: Bool[Array, "n"] | None = None
) -> RoutePlan:
    """Every alternative takes the ``slots`` rows that score it highest (Zhou et al. 2022, eq. 2-3).

    A row gets between none and all alternatives; its combine weights are the plain scores. Not causal: whether a row
    is taken depends on the other rows.

    Args:
      scores: float32 [n e].
      slots: static, rows an alternative, 1 <= slots <= n.
      allowed: [n], rows that may be taken; an alternative takes fewer where there are not enough.

    Returns:
      A plan with one slot for every alternative, in index order; ``bound`` is ``slots * e``.
    """
    n, e = scores.shape
    check_slots(slots, n)
    ranked_by = scores if allowed is None else jnp.where(allowed[:, None], scores, -jnp.inf)
    rows = _highest(ranked_by.T, slots)
    keep = jnp.zeros((e, n), bool).at[jnp.arange(e)[:, None], rows].set(True).T
    keep = keep if allowed is None else keep & allowed[:, None]
    experts = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32), (n, e))
    return RoutePlan(experts, jnp.where(keep, scores, 0.0), keep, bound=slots * e)


def best_groups(
    scores: Float[Array, "n e"], groups: int, keep: int, *, best: int = 2
) -> Bool[Array, "n e"]:
    """Which alternatives are in the ``keep`` groups whose ``best`` highest scores sum to most (DeepSeek-V3).

    Alternatives are split into equal, consecutive groups. Mask the others with -inf, not 0: scores may be negative.
    """
    n, e = scores.shape
    if groups < 1 or e % groups or not 1 <= keep <= groups or e // groups < best:
        raise DyncompError(
            f"best_groups: {e} alternatives in {groups} groups of which {keep} stay; groups must divide them"
            f" into {best} or more each"
        )
    inside = scores.reshape(n, groups, e // groups)
    total = jnp.sum(lax.top_k(inside, best)[0], axis=-1)
    chosen = (
        jnp.zeros((n, groups), bool).at[jnp.arange(n)[:, None], _highest(total, keep)].set(True)
    )
    return jnp.repeat(chosen, e // groups, axis=-1)


def random_slots(
    key: Key[Array, ""], counts: Int[Array, "n"], num_experts: int, *, max_slots: int | None = None
) -> RoutePlan:
    """A control: ``counts[i]`` distinct alternatives drawn uniformly for row i, each weighted 1/counts[i]."""
    slots = num_experts if max_slots is None else max_slots
    check_slots(slots, num_experts)
    noise = jax.random.uniform(key, (counts.shape[0], num_experts))
    experts = jnp.argsort(noise, axis=-1).astype(jnp.int32)[:, :slots]
    keep = jnp.arange(slots)[None, :] < counts[:, None]
    share = 1.0 / jnp.maximum(counts, 1).astype(jnp.float32)
    return RoutePlan(experts, jnp.where(keep, share[:, None], 0.0), keep)


def gumbel_top_k(
    key: Key[Array, ""], logits: Float[Array, "n e"], k: int, *, temperature: float = 1.0
) -> RoutePlan:
    """k alternatives sampled without replacement in proportion to softmax(logits) (Kool et al. 2019).

    The combine weights are softmax((logits + noise) / temperature) at the chosen ones, so gradients are those of
    the relaxed sample (Jang et al. 2017).
    """
    check_slots(k, logits.shape[-1])
    noisy = logits + jax.random.gumbel(key, logits.shape)
    experts = _highest(noisy, k)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    weights = jnp.take_along_axis(soft, experts, axis=-1)
    return RoutePlan(experts, weights, jnp.ones(weights.shape, bool))


def straight_through(hard: Float[Array, "*n"], soft: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Value of ``hard``, gradient of ``soft`` (Bengio et al. 2013)."""
    return soft + lax.stop_gradient(hard - soft)


def keep_top(scores: Float[Array, "n"], k: int) -> KeepPlan:
    """The k rows with the highest scores, in row order; k is static, so the saving is too."""
    check_slots(k, scores.shape[0])
    index = jnp.sort(_highest(scores, k))
    return KeepPlan(index, jnp.ones((k,), bool), scores[index])


def keep_above(scores: Float[Array, "n"], tau: Float[Array, ""], *, max_rows: int) -> KeepPlan:
    """Rows whose score is at least ``tau``, at most ``max_rows`` of them (the highest)."""
    plan = keep_top(scores, max_rows)
    keep = plan.weights >= tau
    return KeepPlan(plan.index, keep, jnp.where(keep, plan.weights, 0.0))


def first_exit(leave: Bool[Array, "b y"], scores: Float[Array, "b y"]) -> ExitPlan:
    """The first exit whose condition holds, else the final classifier (index y).

    Args:
      leave: bool [b y], whether each exit before the final one lets the example go.
      scores: float32 [b y], what the condition looked at; reported in the plan.
    """
    never = jnp.ones((leave.shape[0], 1), bool)
    exit_index = jnp.argmax(jnp.concatenate([leave, never], axis=1), axis=1).astype(jnp.int32)
    final = jnp.full((leave.shape[0], 1), jnp.nan, scores.dtype)
    return ExitPlan(exit_index, jnp.concatenate([scores, final], axis=1))


def _highest(scores: Float[Array, "*n e"], k: int) -> Int[Array, "*n k"]:
    """Where the k highest scores of each row are, best first. Alone, `lax.top_k` ranks -0.0 below 0.0."""
    _, index = lax.top_k(jnp.where(scores == 0, jnp.zeros_like(scores), scores), k)
    return index.astype(jnp.int32)


def check_slots(k: int, alternatives: int) -> None:
    """Refuses a slot count outside [1, alternatives]."""
    if not 1 <= k <= alternatives:
        raise DyncompError(f"{k} slots of {alternatives} alternatives: choose 1..{alternatives}")
