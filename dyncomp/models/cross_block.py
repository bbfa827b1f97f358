"""A decoder's block that also reads a memory: self-attention, cross-attention, feed-forward, each behind its norm."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from dyncomp.attention.cross import CrossAttention
from dyncomp.core.aux import Aux, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.sharding import constrain
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.models.block import ACTIVATION
from dyncomp.models.norm import Norm, NormKind


class CrossBlock(nn.Module):
    """``x + mixer(norm(x))``, then ``x + cross(norm(x), memory)``, then ``x + ffn(norm(x))``.

    The memory is the same for all blocks of a stack and travels with ``below``: ``memory`` [b s d] and ``seen`` [b s]
    bool, False for its padding. A cache holds ``mixer``, the self-attention's, and the memory's ``keys`` and
    ``values`` [b s h p], which the block then reads instead of making its own.

    Attributes:
      d_model: d.
      mixer: factory of causal self-attention; its cache policy decides how steps are kept.
      ffn: factory of the ffn seam.
      heads: of the cross-attention.
      bias: of the cross-attention.
      norm, eps: of all three norms.
    """

    d_model: int
    mixer: Factory
    ffn: Factory
    heads: int
    bias: bool = False
    norm: NormKind = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.mixer, "CrossBlock.mixer")
        check_factory(self.ffn, "CrossBlock.ffn")
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.attn = self.mixer(dtypes=self.dtypes)
        self.cross = CrossAttention(self.d_model, self.heads, self.bias, self.dtypes)
        self.feed = self.ffn(dtypes=self.dtypes)
        make = lambda: Norm(kind=self.norm, eps=self.eps, dtypes=self.dtypes)
        self.attn_norm, self.cross_norm, self.feed_norm = make(), make(), make()

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: Any = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        below: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Runs the block; side results nest under ``mixer``, ``cross`` and ``ffn``.

        ``capture=("hidden",)`` puts the block's output into the plans.
        """
        below = below or {}
        own = None if cache is None else cache["mixer"]
        y, mixed = self.attn(self.attn_norm(x), positions, mask, own, train=train, capture=capture)
        x = constrain(x + y, ACTIVATION)
        rows = self.cross_norm(x)
        if cache is None:
            y, read = self.cross(rows, below["memory"], below["seen"], mask)
        else:
            y, read = self.cross.read(rows, cache["keys"], cache["values"], below["seen"], mask)
        x = constrain(x + y, ACTIVATION)
        y, fed = self.feed(self.feed_norm(x), mask, train=train, capture=capture)
        x = constrain(x + y, ACTIVATION)
        aux = nest(mixer=mixed, cross=read, ffn=fed)
        after = None if cache is None else {**cache, "mixer": mixed.cache}
        plans = {**aux.plans, "hidden": x} if "hidden" in capture else aux.plans
        return x, dataclasses.replace(aux, cache=after, plans=plans, below=dict(below))

    def keys_values(self, memory: Float[Array, "b s d"]) -> tuple[Array, Array]:
        """The memory's keys and values for this block, each [b s h p]."""
        return self.cross.keys_values(memory)

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """Prices of all three units' events."""
        cross = CrossAttention(d_model, self.heads, self.bias, self.dtypes, parent=None)
        return {
            "mixer": self.mixer(parent=None, dtypes=self.dtypes).cost(d_model, length),
            "cross": cross.cost(),
            "ffn": self.ffn(parent=None, dtypes=self.dtypes).cost(d_model),
        }
