"""Which of two language models runs the next step: by a rolling mean of entropies, and two controls.

All switches share one interface, so that a decode loop can take any: ``init(batch, key)`` gives a state whose leaves
have a leading batch axis, ``step(state, entropy, threshold)`` is called after each token with the entropy of the model
that has just run, and says who runs next. Models are `SMALL` (0) and `LARGE` (1); every row decides for itself.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Key
from dyncomp.decoding.sampling import row_keys

SMALL, LARGE = 0, 1
Model = Literal["small", "large"]


@struct.dataclass
class SwitchState:
    """What a switch remembers.

    Attributes:
      model: int32 [b], who runs now.
      dwell: int32 [b], tokens since the last switch; `RandomSwitch`, `PeriodicSwitch`: tokens left in this run.
      recent: float32 [b w], the last entropies, newest last; 0 where there is none yet.
      seen: int32 [b], how many entropies there have been.
      key: one for each row, or None.
    """

    model: Int[Array, "b"]
    dwell: Int[Array, "b"]
    recent: Float[Array, "b w"]
    seen: Int[Array, "b"]
    key: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropySwitch:
    """The large model while the rolling mean entropy is above a threshold (arXiv 2502.06833).

    After each token, once ``min_dwell`` tokens have passed since the last switch (or the start): mean > threshold
    chooses the large model, else the small one. The entropies, in bits, are those of the model that runs. The paper
    lets both branches fire at equality; that the small model wins there, that the large one starts, that the buffer
    survives a switch and that the mean is over what exists until ``window`` are there are recommendations of our
    sheet, not stated in the paper.

    Attributes:
      window: entropies in the rolling mean (w = 5 in the paper).
      min_dwell: tokens between two switches (d_min = 10).
      start: who runs first.
    """

    window: int = 5
    min_dwell: int = 10
    start: Model = "large"

    def __post_init__(self):
        _check_start(self.start)
        if self.window < 1 or self.min_dwell < 1:
            raise DyncompError(
                f"EntropySwitch: window={self.window}, min_dwell={self.min_dwell}; use >= 1"
            )

    def init(self, batch: int, key: Key[Array, "*_"] | None = None) -> SwitchState:
        """Before the first token; ``key`` is not used."""
        return _blank(batch, self.start, self.window)

    def step(
        self,
        state: SwitchState,
        entropy: Float[Array, "b"],
        threshold: Float[Array, ""] | Float[Array, "b"],
    ) -> tuple[SwitchState, Int[Array, "b"]]:
        """The state after a token and the model of the next one; ``threshold`` in bits, may differ by row."""
        recent = jnp.concatenate([state.recent[:, 1:], entropy.astype(jnp.float32)[:, None]], 1)
        seen, dwell = state.seen + 1, state.dwell + 1
        mean = jnp.sum(recent, axis=1) / jnp.minimum(seen, self.window).astype(jnp.float32)
        wanted = jnp.where(mean > threshold, LARGE, SMALL).astype(jnp.int32)
        model = jnp.where(dwell >= self.min_dwell, wanted, state.model)
        dwell = jnp.where(model == state.model, dwell, 0)
        return SwitchState(model, dwell, recent, seen, state.key), model


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeriodicSwitch:
    """A control: ``large`` tokens by the large model, then ``small`` by the small one, and so on."""

    large: int
    small: int
    start: Model = "large"

    def __post_init__(self):
        _check_start(self.start)
        if self.large < 1 or self.small < 1:
            raise DyncompError(f"PeriodicSwitch: large={self.large}, small={self.small}; use >= 1")

    def init(self, batch: int, key: Key[Array, "*_"] | None = None) -> SwitchState:
        """Before the first token; ``key`` is not used."""
        state = _blank(batch, self.start)
        return dataclasses.replace(state, dwell=self._run(state.model))

    def step(self, state: SwitchState, entropy: Float[Array, "b"], threshold: Float[Array, "*_"]):
        """Counts down; entropies are not looked at."""
        left = state.dwell - 1
        model = jnp.where(left > 0, state.model, 1 - state.model)
        left = jnp.where(left > 0, left, self._run(model))
        return dataclasses.replace(state, model=model, dwell=left, seen=state.seen + 1), model

    def _run(self, model: Int[Array, "b"]) -> Int[Array, "b"]:
        return jnp.where(model == LARGE, self.large, self.small).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSwitch:
    """A control: switches at random times, each run as long as one drawn from those of another switch.

    With the runs of an `EntropySwitch` (`trace.run_lengths`) the run lengths have its distribution, and the large
    model its share in the long run. For exactly the same runs of a finite text, see `trace.shuffled_runs`.

    Attributes:
      large: run lengths of the large model, drawn from with replacement.
      small: of the small one.
      start: who runs first.
    """

    large: Sequence[int]
    small: Sequence[int]
    start: Model = "large"

    def __post_init__(self):
        _check_start(self.start)
        for name in ("large", "small"):
            runs = tuple(int(run) for run in getattr(self, name))
            if not runs or min(runs) < 1:
                raise DyncompError(f"RandomSwitch: {name}={runs}; give run lengths of 1 or more")
            object.__setattr__(self, name, runs)  # hashable

    def init(self, batch: int, key: Key[Array, "*_"] | None = None) -> SwitchState:
        """Before the first token; ``key`` is one for all rows or one a row (see `sampling.row_keys`)."""
        if key is None:
            raise DyncompError("RandomSwitch.init: give a random key")
        state = _blank(batch, self.start)
        return self._draw(dataclasses.replace(state, key=row_keys(key, batch)), state.model)

    def step(self, state: SwitchState, entropy: Float[Array, "b"], threshold: Float[Array, "*_"]):
        """Counts down; entropies are not looked at."""
        left = state.dwell - 1
        model = jnp.where(left > 0, state.model, 1 - state.model)
        fresh = self._draw(state, model)
        left = jnp.where(left > 0, left, fresh.dwell)
        return dataclasses.replace(fresh, model=model, dwell=left, seen=state.seen + 1), model

    def _draw(self, state: SwitchState, model: Int[Array, "b"]) -> SwitchState:
        """The state with a new run length of ``model`` for every row."""

        def pick(key, runs):
            table = jnp.asarray(runs, jnp.int32)
            return table[jax.random.randint(key, (), 0, len(runs))]

        both = jax.vmap(jax.random.split)(state.key)
        large = jax.vmap(lambda key: pick(key, self.large))(both[:, 0])
        small = jax.vmap(lambda key: pick(key, self.small))(both[:, 0])
        return dataclasses.replace(
            state, dwell=jnp.where(model == LARGE, large, small), key=both[:, 1]
        )


def _check_start(start: str) -> None:
    if start not in ("small", "large"):
        raise DyncompError(f"start={start!r}: use 'small' or 'large'")


def _blank(batch: int, start: Model, window: int = 1) -> SwitchState:
    model = jnp.full((batch,), LARGE if start == "large" else SMALL, jnp.int32)
    zeros = jnp.zeros((batch,), jnp.int32)
    return SwitchState(model, zeros, jnp.zeros((batch, window), jnp.float32), zeros)
