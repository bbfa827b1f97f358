"""Losses for heads and gates (JEI-DNN, arXiv 2310.09163, and its released code; Shallow-Deep Networks).

All take the output of `models.exiting.ExitingClassifier`: ``logits`` [x b c] with the final classifier last,
``gates`` [y b] logits, ``costs`` [x] cumulative and normalised (the last is 1), ``pos_weight`` [y].
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float, Int
from dyncomp.exits.oracle import TargetScore, best_exit, cross_entropy, exit_loss
from dyncomp.exits.rules import exit_mass

Reweight = Literal["paper", "boosted_sg", "official_identity"]


def head_loss(
    ce: Float[Array, "y b"], mass: Float[Array, "y b"], reweight: Reweight
) -> Float[Array, "b"]:
    """The classifier phase's loss of each example, from the exits before the final one.

    ``paper``: sum_l P_l CE_l. ``boosted_sg``: mean_l r P_l CE_l with r = (sum_l CE_l) / (sum_l P_l CE_l) held
    constant. ``official_identity``: the same with r differentiated, as in the released code; then both value and
    gradient equal those of mean_l CE_l, whatever the gates say. P is always held constant.

    Raises:
      DyncompError: unknown ``reweight``.
    """
    mass = lax.stop_gradient(mass)
    weighted = jnp.sum(mass * ce, axis=0)
    if reweight == "paper":
        return weighted
    # All mass on the final classifier leaves nothing to divide by.
    ratio = jnp.sum(ce, axis=0) / jnp.maximum(weighted, 1e-12)
    if reweight == "boosted_sg":
        ratio = lax.stop_gradient(ratio)
    elif reweight != "official_identity":
        raise DyncompError(
            f"reweight={reweight!r}: use 'paper', 'boosted_sg' or 'official_identity'"
        )
    return ratio * weighted / ce.shape[0]


def gate_targets(best: Int[Array, "b"], exits: int) -> Float[Array, "y b"]:
    """y_l = 1 for every exit at or after t* ("here or anywhere later would do"); all 0 when the final is best."""
    return (jnp.arange(exits)[:, None] >= best[None]).astype(jnp.float32)


def gate_loss(
    gates: Float[Array, "y b"], targets: Float[Array, "y b"], pos_weight: Float[Array, "y"]
) -> Float[Array, "b"]:
    """Mean over gates of the binary cross-entropy of gate logits, positives weighted per gate."""
    positive = pos_weight[:, None] * targets * jax.nn.softplus(-gates)
    return jnp.mean(positive + (1.0 - targets) * jax.nn.softplus(gates), axis=0)


def weighted_mean(values: Float[Array, "b"], mask: Float[Array, "b"]) -> Float[Array, ""]:
    """Mean over real examples; 0 if there are none."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiExitObjective:
    """Weighted cross-entropies of all heads (stage 0 of JEI-DNN; uniform weights: plain multi-exit training).

    Attributes:
      weights: ``descending`` weighs exit l of y with y + 2 - l (y+1 .. 2); ``uniform`` takes the mean over exits.
      final: also train the final classifier, with weight 1 (a backbone that is not frozen).
    """

    weights: Literal["descending", "uniform"] = "descending"
    final: bool = False

    def __post_init__(self):
        if self.weights not in ("descending", "uniform"):
            raise DyncompError(f"weights={self.weights!r}: use 'descending' or 'uniform'")

    def __call__(self, output: Mapping[str, Array], aux: Any, batch: Mapping[str, Any], step):
        """Loss and the accuracy of every exit; the frozen final classifier gets no gradient."""
        ce = cross_entropy(output["logits"], batch["targets"])
        exits = ce.shape[0] - 1
        last = ce[-1] if self.final else lax.stop_gradient(ce[-1])
        scale = jnp.arange(exits + 1, 1, -1, dtype=jnp.float32)
        if self.weights == "uniform":
            scale = jnp.full((exits,), 1.0 / exits, jnp.float32)
        loss = weighted_mean(last + jnp.sum(scale[:, None] * ce[:-1], axis=0), batch["mask"])
        return loss, {"ce": Mean.of(ce, batch["mask"][None]), **accuracies(output, batch)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RampedExitObjective:
    """Final cross-entropy + sum_l tau_l CE_l: backbone and exits together (Shallow-Deep Networks, Kaya et al. 2019).

    tau_l rises linearly from ``start`` to the exit's relative depth, so that early exits do not take over a backbone
    that has not learned anything yet.

    Attributes:
      steps: over which tau rises; then it stays.
      start: of every tau.
      targets: what tau rises to, one an exit; default the relative depth in FLOPs (``costs`` of the output). 0 leaves
        an exit untrained after its start; with ``start`` = 0 it gets no gradient at all.
    """

    steps: int
    start: float = 0.01
    targets: Sequence[float] = ()

    def __post_init__(self):
        if self.steps < 1 or self.start < 0 or any(target < 0 for target in self.targets):
            raise DyncompError(
                f"RampedExitObjective: steps={self.steps}, start={self.start}, targets={self.targets}; "
                "use steps >= 1 and weights >= 0"
            )

    def weights(
        self, step: Int[Array, ""] | int, costs: Float[Array, "x"] | np.ndarray
    ) -> Float[Array, "y"]:
        """tau at a step."""
        targets = jnp.asarray(self.targets or costs[:-1], jnp.float32)
        if targets.shape != costs[:-1].shape:
            raise DyncompError(
                f"targets={self.targets}: give one to each of {len(costs) - 1} exits"
            )
        risen = jnp.minimum(step / jnp.float32(self.steps), 1.0)
        return self.start + risen * (targets - self.start)

    def __call__(self, output: Mapping[str, Array], aux: Any, batch: Mapping[str, Any], step):
        """Loss and the accuracy of every exit."""
        ce = cross_entropy(output["logits"], batch["targets"])
        tau = self.weights(step, output["costs"])
        loss = weighted_mean(ce[-1] + jnp.sum(tau[:, None] * ce[:-1], axis=0), batch["mask"])
        return loss, {"ce": Mean.of(ce, batch["mask"][None]), **accuracies(output, batch)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointExitObjective:
    """Heads and gates in turn: every ``period`` steps the phase changes; each epoch starts in the gate phase.

    In a phase only its own group has a loss, so the gradient of the other is exactly zero; the optimiser must also
    leave it alone (momentum and decay), which is what `phase` is for.

    Attributes:
      lam: lambda, the price of compute in the gates' targets, in units of the score.
      reweight: see `head_loss`.
      target_score: see `oracle.exit_loss`.
      period: steps between switches.
      steps_per_epoch: steps after which the cycle starts anew; 0 for one endless epoch.
      first_step: global step at which this stage begins.
    """

    lam: float = 0.7
    reweight: Reweight = "paper"
    target_score: TargetScore = "ce"
    period: int = 200
    steps_per_epoch: int = 0
    first_step: int = 0

    def __post_init__(self):
        if self.reweight not in ("paper", "boosted_sg", "official_identity"):
            raise DyncompError(
                f"reweight={self.reweight!r}: use 'paper', 'boosted_sg' or 'official_identity'"
            )
        if self.target_score not in ("ce", "error", "confidence"):
            raise DyncompError(
                f"target_score={self.target_score!r}: use 'ce', 'error' or 'confidence'"
            )
        if self.period < 1 or self.lam < 0:
            raise DyncompError(
                f"period={self.period}, lam={self.lam}: use period >= 1 and lam >= 0"
            )

    def in_gate_phase(self, step: Int[Array, ""] | int):
        """Whether ``step`` trains the gates; works on Python and traced integers."""
        step = step - self.first_step
        step = step % self.steps_per_epoch if self.steps_per_epoch else step
        return (step // self.period) % 2 == 0

    def __call__(self, output: Mapping[str, Array], aux: Any, batch: Mapping[str, Any], step):
        """The loss of the current phase."""
        gate, heads = self.gate(output, batch), self.heads(output, batch)
        loss = jnp.where(self.in_gate_phase(step), gate, heads)
        scalars = {"gate_loss": Mean.of(gate), "head_loss": Mean.of(heads)}
        return loss, {**scalars, **accuracies(output, batch)}

    def gate(self, output: Mapping[str, Array], batch: Mapping[str, Any]) -> Float[Array, ""]:
        """Gate phase: weighted BCE to the cumulative targets of t*. Heads and backbone get no gradient."""
        best = self.best(output, batch)
        targets = gate_targets(best, output["gates"].shape[0])
        pos_weight = lax.stop_gradient(output["pos_weight"])
        return weighted_mean(gate_loss(output["gates"], targets, pos_weight), batch["mask"])

    def heads(self, output: Mapping[str, Array], batch: Mapping[str, Any]) -> Float[Array, ""]:
        """Classifier phase: reweighted cross-entropies of the heads. Gates get no gradient."""
        ce = cross_entropy(output["logits"][:-1], batch["targets"])
        mass = exit_mass(jax.nn.sigmoid(lax.stop_gradient(output["gates"])))
        return weighted_mean(head_loss(ce, mass, self.reweight), batch["mask"])

    def best(self, output: Mapping[str, Array], batch: Mapping[str, Any]) -> Int[Array, "b"]:
        """t* of every example, the final classifier included."""
        logits = lax.stop_gradient(output["logits"])
        loss = exit_loss(logits, batch["targets"], self.target_score)
        return best_exit(loss, output["costs"], self.lam)


def accuracies(output: Mapping[str, Array], batch: Mapping[str, Any]) -> dict[str, Mean]:
    """``accuracy_exit_i`` of every exit, over real examples."""
    right = jnp.argmax(output["logits"], axis=-1) == batch["targets"][None]
    return {f"accuracy_exit_{i}": Mean.of(row, batch["mask"]) for i, row in enumerate(right)}
