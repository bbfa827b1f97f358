"""Optimizers as frozen dataclasses over optax, so that a config can name them."""

import dataclasses
import re
from collections.abc import Hashable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.training.state import paths

ScheduleKind = Literal["cosine", "linear", "constant"]


@runtime_checkable
class Optimizer(Protocol):
    """Builds an optax transformation for a stage of a given length."""

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation."""
        ...


def schedule(
    kind: str, peak: float, steps: int, warmup: int, final_fraction: float
) -> optax.Schedule:
    """Linear warm-up to ``peak``, then cosine or linear to ``final_fraction`` of it, or constant."""
    rest = max(steps - warmup, 1)
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=final_fraction)
    elif kind == "linear":
        after = optax.linear_schedule(peak, peak * final_fraction, rest)
    elif kind == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise DyncompError(f"schedule={kind!r}: use 'cosine', 'linear' or 'constant'")
    if not warmup:
        return after
    ramp = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) with clipping by global norm and a schedule.

    Attributes:
      weight_decay: applied to leaves of two or more dimensions only.
      clip_norm: 0 for no clipping.
      warmup_steps, schedule, final_fraction: see `schedule`.
    """

    learning_rate: float
    schedule: ScheduleKind = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a stage of ``steps``."""
        rate = schedule(
            self.schedule, self.learning_rate, steps, self.warmup_steps, self.final_fraction
        )
        adam = optax.adamw(
            rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=_matrices
        )
        return (
            optax.chain(optax.clip_by_global_norm(self.clip_norm), adam) if self.clip_norm else adam
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD:
    """SGD with momentum, decoupled from nothing: decay is added to the gradient, as the sheets' codes do."""

    learning_rate: float
    schedule: ScheduleKind = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a stage of ``steps``."""
        rate = schedule(
            self.schedule, self.learning_rate, steps, self.warmup_steps, self.final_fraction
        )
        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        parts += [optax.add_decayed_weights(self.weight_decay)] if self.weight_decay else []
        return optax.chain(*parts, optax.sgd(rate, self.momentum))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating:
    """Groups of parameters take turns of ``period`` steps; a group that waits keeps its moments and its weights.

    Learning-rate schedules are as long as the group's own turns. Parameters of no group do not move.

    Attributes:
      groups: regular expression of parameter paths -> optimizer, in order of their turns; the first match counts.
      period: steps a turn.
      cycle: steps after which the first group starts again (an epoch); 0 for no restart.
    """

    groups: Mapping[str, Optimizer]
    period: int = 200
    cycle: int = 0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a stage of ``steps``."""
        names = list(self.groups)
        owner = self._owner(np.arange(steps))

        def turn_of(index: int):
            return lambda step, **_: self._owner(step) == index

        # A schedule counts the steps of its own group only, so it must be as long as they are.
        inner = {
            name: optax.conditionally_mask(
                optimizer.build(max(int((owner == index).sum()), 1)), turn_of(index)
            )
            for index, (name, optimizer) in enumerate(self.groups.items())
        }
        return optax.partition({**inner, "": optax.set_to_zero()}, lambda p: label(p, names))

    def _owner(self, step: Any) -> Any:
        """Index of the group whose turn a step is."""
        place = step % self.cycle if self.cycle else step
        return (place // self.period) % len(self.groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped:
    """Groups of parameters, each with its own optimizer, all at once (a lower rate for some, no decay for others).

    Attributes:
      groups: regular expression of parameter paths -> optimizer; the first match counts. Parameters of no group do not
        move. Leave their own ``clip_norm`` at 0.
      clip_norm: by the global norm of all groups together; 0 for no clipping.
    """

    groups: Mapping[str, Optimizer]
    clip_norm: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a stage of ``steps``."""
        names = list(self.groups)
        inner = {name: optimizer.build(steps) for name, optimizer in self.groups.items()}
        tx = optax.partition({**inner, "": optax.set_to_zero()}, lambda p: label(p, names))
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), tx) if self.clip_norm else tx


def label(params: Any, patterns: list[str]) -> Any:
    """For every leaf the first pattern found in its path, or ""."""
    names = [next((p for p in patterns if re.search(p, path)), "") for path in paths(params)]
    for pattern in patterns:
        if pattern not in names:
            raise DyncompError(
                f"no parameter path matches {pattern!r}; paths look like {', '.join(paths(params)[:3])}"
            )
    return jax.tree.unflatten(jax.tree.structure(params), names)


def hold(params: Any, trainable: str) -> Any:
    """The same parameters, constant to differentiation where the path does not match ``trainable``.

    Nothing is propagated back through a part of the network that has no moving parameter.
    """
    moving = label(params, [trainable])
    return jax.tree.map(lambda x, name: x if name else lax.stop_gradient(x), params, moving)


def freeze(tx: optax.GradientTransformation, trainable: str) -> optax.GradientTransformation:
    """Moves only parameters whose path matches; the others get no optimizer state and exactly no update."""
    if trainable == ".*":
        return tx
    groups: dict[Hashable, Any] = {trainable: tx, "": optax.set_to_zero()}
    return optax.partition(groups, lambda params: label(params, [trainable]))
