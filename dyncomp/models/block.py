"""A pre-norm residual block with two seams: what mixes positions, and what acts on each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from dyncomp.attention import CacheState
from dyncomp.core.aux import Aux, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.sharding import constrain
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.models.norm import Norm, NormKind

ACTIVATION = ("batch", "seq", None)


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + ffn(norm(x))``.

    Attributes:
      mixer: factory of the mixer seam, e.g. `attention.Attention`.
      ffn: factory of the ffn seam, e.g. `experts.SwiGLU` or `experts.MoE`.
      norm: kind of both norms.
      eps: added to the variance.
    """

    mixer: Factory
    ffn: Factory
    norm: NormKind = "rms"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.mixer, "Block.mixer")
        check_factory(self.ffn, "Block.ffn")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: Any = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        below: Mapping[str, Array] | None = None,
        visible: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Runs the block; side results nest under ``mixer`` and ``ffn``.

        ``capture=("hidden",)`` puts the block's output into the plans. ``below`` is what the blocks below hand up
        (`below_like` at first, and zeros for what cache policies hand up); ``Aux.below`` is the same with this block's
        share renewed. ``visible`` is the mixer's, which hears of it only where it is given.
        """
        mixer = self.mixer(name="mixer", dtypes=self.dtypes)
        ffn = self.ffn(name="ffn", dtypes=self.dtypes)
        own = cache["mixer"] if cache is not None else None
        seen: dict[str, Any] = {} if visible is None else {"visible": visible}
        if isinstance(own, CacheState) and own.handed():
            seen["below"] = below
        y, mixed = mixer(
            self._norm("mixer_norm")(x), positions, mask, own, train=train, capture=capture, **seen
        )
        x = constrain(x + y, ACTIVATION)
        handed = {"below": below} if self.below_like(1, 1) else {}
        y, fed = ffn(self._norm("ffn_norm")(x), mask, train=train, capture=capture, **handed)
        x = constrain(x + y, ACTIVATION)
        up = {**mixed.below, **fed.below}
        aux = dataclasses.replace(nest(mixer=mixed, ffn=fed), below={**(below or {}), **up})
        if "hidden" in capture:
            aux = dataclasses.replace(aux, plans={**aux.plans, "hidden": x})
        return x, aux

    def below_like(self, batch: int, length: int) -> dict[str, Array]:
        """What the ffn unit wants handed up, as the first block sees it; empty for most units."""
        like = getattr(self.ffn(parent=None, dtypes=self.dtypes), "below_like", None)
        return {} if like is None else like(batch, length)

    def _norm(self, name: str) -> Norm:
        return Norm(kind=self.norm, eps=self.eps, dtypes=self.dtypes, name=name)

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """Prices of the mixer's and the ffn's events."""
        return {
            "mixer": self.mixer(parent=None, dtypes=self.dtypes).cost(d_model, length),
            "ffn": self.ffn(parent=None, dtypes=self.dtypes).cost(d_model),
        }

    def init_cache(self, d_model: int, batch: int, max_length: int) -> dict[str, Any]:
        """An empty cache of the block."""
        mixer = self.mixer(parent=None, dtypes=self.dtypes)
        return {"mixer": mixer.init_cache(d_model, batch, max_length)}
