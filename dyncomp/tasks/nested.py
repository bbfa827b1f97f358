"""The objective of models whose every prefix of blocks is a model: one exit's logits at a time."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core import rng
from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Float
from dyncomp.depth import SortedMode, exit_logits, sorted_loss, sub_model_weights
from dyncomp.tasks.objectives import token_nll


@dataclasses.dataclass(frozen=True)
class NestedObjective:
    """Cross-entropy of the sub-models of a `models.NestedLM` (sorted fine-tuning, arXiv 2309.08968, eq. 1).

    Exits follow one another in a scan whose body is computed again in the backward pass, so the logits of one exit (or
    of one part of its positions) are all that is ever held, in both directions.

    Attributes:
      mode: "sum", the mean over all exits each step; "sample", one of them, drawn uniformly (SortedNet).
      exits: the exits that train (indices, "sum" only); None for all. (-1,) is plain fine-tuning of the whole model.
      parts: cut the positions into this many parts, each with its own logits.
      seed: of the draws, which are a function of it and the step.
    """

    mode: SortedMode = "sum"
    exits: tuple[int, ...] | None = None
    parts: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.mode not in ("sum", "sample") or self.parts < 1:
            raise DyncompError(
                f"NestedObjective: mode={self.mode!r}, parts={self.parts}; use 'sum' or 'sample', 1 or more parts"
            )
        if self.exits is not None and (self.mode == "sample" or not self.exits):
            raise DyncompError("NestedObjective.exits: name exits with mode='sum', or None")

    def __call__(
        self, output: Mapping[str, Array], aux: Aux, batch: Mapping[str, Any], step: Any
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        """The loss, and the metric nll_i of every exit i that trained (``nll_drawn`` of the one that was drawn).

        Raises:
          DyncompError: output of another model, an exit that does not exist, or parts that do not divide the positions.
        """
        exit_logits(output, 0)
        count = output["states"].shape[0]
        if self.mode == "sample":
            drawn = sub_model_weights(count, "sample", rng.fold(self.seed, step, "sub_model"))
            chosen, names = jnp.argmax(drawn)[None], ["nll_drawn"]
        else:
            own = self._exits(count)
            chosen, names = jnp.asarray(own), [f"nll_{index}" for index in own]
        ce = self._nll(output, chosen, batch["targets"])
        loss = sorted_loss(ce, sub_model_weights(len(names)), batch["mask"])
        means = (Mean.of(one, batch["mask"]) for one in ce)
        return loss, dict(zip(names, means, strict=True))

    def _exits(self, count: int) -> list[int]:
        own = range(count) if self.exits is None else self.exits
        if wrong := [index for index in own if not -count <= index < count]:
            raise DyncompError(f"NestedObjective.exits names {wrong[0]}; there are {count} exits")
        return [index % count for index in own]

    def _nll(
        self, output: Mapping[str, Array], exits: Array, targets: Any
    ) -> Float[Array, "x b t"]:
        """Nats of the chosen exits at every target."""
        states, heads = output["states"], output["heads"]
        targets = jnp.asarray(targets)
        b, t = targets.shape
        if t % self.parts:
            raise DyncompError(
                f"NestedObjective.parts={self.parts} does not divide {t} positions; choose a divisor"
            )
        width = t // self.parts

        @jax.checkpoint
        def piece(states: Array, heads: Array, exit: Array, part: Array) -> Array:
            cut = lambda x, axis: lax.dynamic_slice_in_dim(x, part * width, width, axis)
            own = {"states": cut(states, 2), "heads": heads}
            return token_nll(exit_logits(own, exit), cut(targets, 1))

        index = jnp.repeat(exits, self.parts), jnp.tile(jnp.arange(self.parts), exits.shape[0])
        body = lambda _, at: (None, piece(states, heads, *at))
        _, found = lax.scan(body, None, index)
        return found.reshape(-1, self.parts, b, width).swapaxes(1, 2).reshape(-1, b, t)
