"""A CNN with linear exits on its own pooled features: the coupled design that two branches are compared with."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float
from dyncomp.models.bottlenecks import ConvLevel, ConvNorm, ConvStage, Size, pooled
from dyncomp.models.staged import StagedClassifier
from dyncomp.models.vit import Head


class ExitingConvNet(StagedClassifier):
    """Stages of bottlenecks; linear classifiers on the mean over the grid after some of them and after the last.

    Parameters: ``stem_conv``, ``stage_i``, ``head_k``; statistics of batch norms are controls.

    Attributes:
      classes: c.
      levels: the stages.
      stem: width of the first convolution, 3x3 of stride 2.
      exits_after: stages, from 0, that an early exit follows; increasing, without the last.
    """

    classes: int
    levels: Sequence[ConvLevel]
    stem: int
    exits_after: Sequence[int] = (2,)
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        self.levels, self.exits_after = tuple(self.levels), tuple(self.exits_after)
        wanted = sorted({i for i in self.exits_after if 0 <= i < len(self.levels) - 1})
        if not wanted or tuple(wanted) != self.exits_after:
            raise DyncompError(
                f"ExitingConvNet.exits_after={self.exits_after}: give increasing stages below {len(self.levels) - 1}"
            )
        super().__post_init__()

    @property
    def depth(self) -> int:  # noqa: D102
        return len(self.exits_after) + 1

    def _modules(self, **kwargs: Any) -> dict[str, Any]:
        own: dict[str, Any] = {"dtypes": self.dtypes, **kwargs}
        return {
            "stem_conv": ConvNorm(self.stem, 3, 2, **own),
            "stage": [ConvStage(level, **own) for level in self.levels],
            "head": [Head(self.classes, **own) for _ in range(self.depth)],
        }

    def setup(self):  # noqa: D102
        for name, value in self._modules().items():
            setattr(self, name, value)

    def _stages(self, index: int) -> range:
        """Of segment ``index``."""
        ends = (-1, *self.exits_after, len(self.levels) - 1)
        return range(ends[index] + 1, ends[index + 1] + 1)

    def start(self, images: Array, train: bool) -> dict[str, Any]:
        """``x_k``: what segment k works on; zeros until it is made."""
        x = self.stem_conv(images.astype(self.dtypes.compute), train)
        size: Size = tuple(x.shape[1:])  # pyrefly: ignore[bad-assignment]
        carry = {"x_0": x}
        for index in range(self.depth - 1):
            for stage in self._stages(index):
                size = self.levels[stage].size(size)
            carry[f"x_{index + 1}"] = jnp.zeros((x.shape[0], *size), x.dtype)
        return carry

    def step(
        self, index: int, carry: dict[str, Any], train: bool
    ) -> tuple[dict[str, Any], Float[Array, "b c"]]:
        """See `StagedClassifier.step`."""
        x = carry[f"x_{index}"]
        for stage in self._stages(index):
            x = self.stage[stage](x, train)
        logits = self.head[index](pooled(x))
        last = index == self.depth - 1
        return (carry if last else {**carry, f"x_{index + 1}": x}), logits

    def parts(self, index: int | None) -> tuple[str, ...]:
        """See `StagedClassifier.parts`."""
        if index is None:
            return ("stem_conv",)
        return (*(f"stage_{stage}" for stage in self._stages(index)), f"head_{index}")

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment: convolutions, the mean, the classifier."""
        made = self._modules(parent=None)
        size: Size = (inputs_shape[1], inputs_shape[2], inputs_shape[3])
        total = made["stem_conv"].cost(size)
        size = -(-size[0] // 2), -(-size[1] // 2), self.stem
        prices = {}
        for index in range(self.depth):
            for stage in self._stages(index):
                total = total + made["stage"][stage].cost(size)
                size = self.levels[stage].size(size)
            head = Cost(2 * size[2] * self.classes)
            prices[f"segment_{index}"] = total + Cost(size[0] * size[1] * size[2]) + head
            total = Cost(0)
        return prices
