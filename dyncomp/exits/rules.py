"""Exit rules: from what the exits say to an `ExitPlan`, one exit after the other.

A rule is a frozen dataclass with a running state, so that the same code decides over all exits at once (masked
execution, training) and after each segment (host execution), with equal bits. Its thresholds are run-time arguments.
"""

import dataclasses
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dyncomp.core.choose import first_exit
from dyncomp.core.dtypes import widened
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import ExitPlan
from dyncomp.core.typing import Array, Bool, Float
from dyncomp.exits.gates import gate_features

Score = Literal["max_p", "entropy", "margin"]


@runtime_checkable
class RunningRule(Protocol):
    """A rule that is told its first state; ``state`` is a pytree whose leaves have a leading batch axis."""

    def initial(self) -> float:
        """Starting threshold of every exit."""
        ...

    def step(self, state, logits, gate, threshold) -> tuple[Any, Array, Array]:
        """(state, leave [b] bool, score [b]) after one exit: logits [b c], gate logit [b], threshold []."""
        ...


@runtime_checkable
class ExitRule(RunningRule, Protocol):
    """A rule that knows its first state."""

    def start(self, batch: int) -> Any:
        """State before the first exit."""
        ...


def exit_mass(gates: Float[Array, "y b"]) -> Float[Array, "y b"]:
    """P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)): the probability of leaving AT exit l (arXiv 2310.09163).

    ``gates`` are direct exit probabilities, not hazards; what is left after the last goes to the final classifier.
    """
    masses, spent = [], jnp.zeros(gates.shape[1:], gates.dtype)
    for gate in gates:  # in exit order, so that running decisions see the same rounding
        masses.append(jnp.maximum(0.0, jnp.minimum(gate, 1.0 - spent)))
        spent = spent + gate
    return jnp.stack(masses)


def hazards(gates: Float[Array, "y b"]) -> Float[Array, "y b"]:
    """h_l = P_l / (1 - sum_{j<l} P_j), and 0 where nothing is left (0/0 := 0)."""
    spent, out = jnp.zeros(gates.shape[1:], gates.dtype), []
    for gate in gates:
        out.append(_hazard(spent, gate))
        spent = spent + gate
    return jnp.stack(out)


def _hazard(spent: Float[Array, "b"], gate: Float[Array, "b"]) -> Float[Array, "b"]:
    """Hazard of one exit; the sum of P so far is min(1, sum of g so far)."""
    left = jnp.maximum(0.0, 1.0 - spent)
    safe = jnp.where(left > 0.0, left, 1.0)
    return jnp.where(left > 0.0, jnp.minimum(gate, left) / safe, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateRule:
    """Leave at the first exit whose hazard reaches the threshold (0.5 in the paper)."""

    hazard: float = 0.5

    def initial(self) -> float:
        """The hazard to reach."""
        return self.hazard

    def start(self, batch: int) -> Float[Array, "b"]:
        """The sum of gates so far."""
        return jnp.zeros((batch,), jnp.float32)

    def step(self, state: Array, logits: Array, gate: Array, threshold: Array):
        """Spends the gate's probability; ``gate`` is its logit."""
        g = jax.nn.sigmoid(gate)
        hazard = _hazard(state, g)
        return state + g, hazard >= threshold, hazard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfidenceRule:
    """Leave at the first exit whose confidence reaches its threshold.

    ``entropy`` is negated, so that a higher score always means surer.
    """

    score: Score = "max_p"
    threshold: float = 0.9

    def __post_init__(self):
        if self.score not in ("max_p", "entropy", "margin"):
            raise DyncompError(f"score={self.score!r}: use 'max_p', 'entropy' or 'margin'")

    def initial(self) -> float:
        """The confidence to reach."""
        return self.threshold

    def start(self, batch: int) -> Float[Array, "b"]:
        """Nothing is remembered."""
        return jnp.zeros((batch,), jnp.float32)

    def step(self, state: Array, logits: Array, gate: Array, threshold: Array):
        """Compares one exit's confidence."""
        score = confidence(logits, self.score)
        return state, score >= threshold, score


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatienceRule:
    """Leave once ``patience`` + 1 successive exits name the same class (Zhou et al. 2020); threshold = patience."""

    patience: float = 1.0

    def initial(self) -> float:
        """How many successive agreements are wanted."""
        return self.patience

    def start(self, batch: int) -> tuple[Array, Array]:
        """(last class, agreements so far)."""
        return jnp.full((batch,), -1, jnp.int32), jnp.zeros((batch,), jnp.float32)

    def step(self, state: tuple[Array, Array], logits: Array, gate: Array, threshold: Array):
        """Counts agreements with the exit before."""
        last, run = state
        label = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        run = jnp.where(label == last, run + 1.0, 0.0)
        return (label, run), run >= threshold, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningSumRule:
    """Leave once the softmax of the sum of all logits so far, over a temperature, is surer than the threshold.

    For exits that add evidence, such as steps of time (arXiv 2303.10276): Z_T = sum_{t<=T} logits_t / temperature. In a
    sum the temperature of step T is temperature / T of the mean, so early steps are under-confident by themselves;
    ``accumulate="mean"`` divides by T as well and takes that away. Strict: a threshold of 1 lets nobody leave.

    Attributes:
      classes: c.
      temperature: the paper's confidence-smoothing scale; 30 in the released code, to be chosen on held-out data.
      threshold: 0.6 in the released code.
      score: see `confidence`.
      accumulate: what confidence is read from.
    """

    classes: int
    temperature: float = 30.0
    threshold: float = 0.6
    score: Score = "max_p"
    accumulate: Literal["sum", "mean"] = "sum"

    def __post_init__(self):
        if self.accumulate not in ("sum", "mean"):
            raise DyncompError(f"accumulate={self.accumulate!r}: use 'sum' or 'mean'")
        if self.score not in ("max_p", "entropy", "margin"):
            raise DyncompError(f"score={self.score!r}: use 'max_p', 'entropy' or 'margin'")
        if self.classes < 2 or self.temperature <= 0.0:
            raise DyncompError(
                f"RunningSumRule: classes={self.classes}, temperature={self.temperature}; use classes >= 2 and"
                " temperature > 0"
            )

    def initial(self) -> float:
        """The confidence to exceed."""
        return self.threshold

    def start(self, batch: int) -> tuple[Float[Array, "b c"], Float[Array, "b"]]:
        """(the sum so far, how many were added)."""
        return jnp.zeros((batch, self.classes), jnp.float32), jnp.zeros((batch,), jnp.float32)

    def step(self, state: tuple[Array, Array], logits: Array, gate: Array, threshold: Array):
        """Adds one exit's logits and compares the confidence in all of them."""
        total, count = state[0] + widened(logits), state[1] + 1.0
        shown = total if self.accumulate == "sum" else total / count[:, None]
        score = confidence(shown / self.temperature, self.score)
        return (total, count), score > threshold, score


def confidence(logits: Float[Array, "*n c"], score: Score) -> Float[Array, "*n"]:
    """Max probability, negative entropy or margin of softmax(logits), float32 or more, detached."""
    if score == "max_p":  # the largest of exp(l - max l) / sum is 1 / sum: no need to sort
        logits = widened(jax.lax.stop_gradient(logits))
        above = logits - jnp.max(logits, axis=-1, keepdims=True)
        return 1.0 / jnp.sum(jnp.exp(above), axis=-1)
    u = gate_features(logits)
    return {"entropy": -u[..., 1], "margin": u[..., 2]}[score]


def decide(
    rule: RunningRule,
    logits: Float[Array, "y b c"],
    gates: Float[Array, "y b"] | None,
    thresholds: Float[Array, "y"],
    state: Any = None,
) -> ExitPlan:
    """Runs the rule over all exits; ``gates`` are logits (read by `GateRule` only).

    ``state`` is what a rule starts with that can't know it by itself (`ConsistencyRule`).
    """
    if state is None:
        assert isinstance(rule, ExitRule), f"{type(rule).__name__} must be told its first state"
        state = rule.start(logits.shape[1])
    leaves, scores = [], []
    for index in range(logits.shape[0]):
        gate = None if gates is None else gates[index]
        state, leave, score = rule.step(state, logits[index], gate, thresholds[index])
        leaves.append(leave)
        scores.append(score)
    return first_exit(_columns(leaves), jnp.stack(scores, axis=1))


def _columns(leaves: list[Bool[Array, "b"]]) -> Bool[Array, "b y"]:
    return jnp.stack(leaves, axis=1)
