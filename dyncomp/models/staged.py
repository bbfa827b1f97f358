"""What classifiers share that end after one of a few unlike segments, each with weights and state of its own."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float
from dyncomp.exits.rules import ConfidenceRule, ExitRule, decide
from dyncomp.models.exiting import cumulative_costs, segments_reached


class StagedClassifier(nn.Module, kw_only=True):
    """Base: a subclass says what ``start`` and each ``step`` do, what they use and what they cost.

    Masked execution (the call), training and the executors of `dyncomp.runtime` run the same steps. The control
    ``thresholds`` [y] belongs to ``rule``; other controls (running statistics) lie at the paths of their modules.

    A subclass has the methods ``start``, ``step``, ``parts`` and ``cost``, and ``depth``.

    Attributes:
      rule: decides where each example leaves.
    """

    rule: ExitRule = ConfidenceRule()

    layers = "unroll"
    """Segments need separate weights; `layout.apply` and `runtime.from_model` read it."""

    @property
    def depth(self) -> int:
        """x: segments, and exits with the final classifier."""
        raise NotImplementedError

    def start(self, images: Array, train: bool) -> dict[str, Any]:
        """What is carried from segment to segment: leaves [b ...], of one shape from here to the end."""
        raise NotImplementedError

    def step(
        self, index: int, carry: dict[str, Any], train: bool
    ) -> tuple[dict[str, Any], Float[Array, "b c"]]:
        """Segment ``index``: the carry and its classifier's logits, float32."""
        raise NotImplementedError

    def parts(self, index: int | None) -> tuple[str, ...]:
        """Names of the submodules (or of lists of them) that segment ``index`` uses; None: ``start``."""
        raise NotImplementedError

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment for one example: ``segment_i``; the first also starts."""
        raise NotImplementedError

    @nn.compact  # the only method with thresholds: segments get theirs as an argument
    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """Runs everything (masked execution) and decides.

        Returns:
          ``logits`` [x b c] of all classifiers; ``exit`` [b] int32; ``emitted`` [b c], the logits each example leaves
          with, and ``final`` [b c], those of the last classifier; ``costs`` [x], cumulative, the last is 1.
          Events per example [b]: needed where the example gets that far, executed everywhere.
        """
        carry, each = self.start(jnp.asarray(images), train), []
        for index in range(self.depth):
            carry, found = self.step(index, carry, train)
            each.append(found)
        logits = jnp.stack(each)
        level = lambda: jnp.full((self.depth - 1,), self.rule.initial(), jnp.float32)
        thresholds = jnp.asarray(self.variable("controls", "thresholds", level).value)
        nothing = jnp.zeros(logits.shape[:2], jnp.float32)[:-1]
        plan = decide(self.rule, logits[:-1], nothing, thresholds)
        output = {
            "logits": logits,
            "exit": plan.exit,
            "emitted": jnp.take_along_axis(logits, plan.exit[None, :, None], axis=0)[0],
            "final": logits[-1],
            "costs": jnp.asarray(self.cumulative_costs(images.shape), jnp.float32),
        }
        plans = {"exit": plan} if "plan" in capture else {}
        return output, Aux({}, segments_reached(plan.exit, self.depth, mask), plans)

    def begin(self, images: Float[Array | np.ndarray, "b h w _"]) -> dict[str, Any]:
        """The carry before the first segment, with the rule's ``state``."""
        images = jnp.asarray(images)
        return {**self.start(images, False), "state": self.rule.start(images.shape[0])}

    def segment(
        self, index: int, carry: dict[str, Any], threshold: Float[Array, ""]
    ) -> tuple[dict[str, Any], Array, Array, Array]:
        """Segment ``index`` and the decision after it, in evaluation.

        Returns:
          (carry, logits [b c], leave [b] bool, score [b]); all leave after the last segment.
        """
        state = carry["state"]
        rest, logits = self.step(
            index, {k: v for k, v in carry.items() if k != "state"}, train=False
        )
        b = logits.shape[0]
        if index == self.depth - 1:
            leave, score = jnp.ones((b,), bool), jnp.full((b,), jnp.nan, jnp.float32)
        else:
            nothing = jnp.zeros((b,), jnp.float32)
            state, leave, score = self.rule.step(state, logits, nothing, threshold)
        return {**rest, "state": state}, logits, leave, score

    def weights_of(self, params: Mapping[str, Any], index: int | None) -> dict[str, Any]:
        """The parameters that segment ``index`` uses; None: those of ``begin``."""
        names = self.parts(index)
        mine = lambda name: any(name == part or _is_item(name, part) for part in names)
        return {name: value for name, value in params.items() if mine(name)}

    def controls_of(self, controls: Mapping[str, Any], index: int | None) -> dict[str, Any]:
        """The controls that segment ``index`` reads besides its threshold (running statistics)."""
        return self.weights_of(controls, index)

    def cumulative_costs(self, inputs_shape: tuple[int, ...]) -> list[float]:
        """c_k: FLOPs up to and including exit k over those of the whole; the last is 1."""
        return cumulative_costs(self.cost(inputs_shape))


def _is_item(name: str, part: str) -> bool:
    """Whether a submodule is an element of the list ``part`` (Linen names it ``part_0``, ``part_1``, ...)."""
    head, _, tail = name.rpartition("_")
    return head == part and tail.isdigit()
