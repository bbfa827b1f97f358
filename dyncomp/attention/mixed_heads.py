"""Heads of several kinds in one layer: mixers side by side whose outputs add up."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import Aux, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory


class MixedHeads(nn.Module):
    """The sum of several mixers of the same input; side results nest under their names.

    A layer's output projection is a sum over heads, so this *is* one attention layer with some heads of each kind.
    Give every part its ``heads`` and its ``head_dim``.

    Attributes:
      parts: name -> factory of a mixer.
    """

    parts: Mapping[str, Factory]
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if not self.parts:
            raise DyncompError("MixedHeads.parts is empty: name at least one mixer")
        for name, part in self.parts.items():
            check_factory(part, f"MixedHeads.parts[{name!r}]")
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
        visible: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Runs every part on ``x``; arguments as of `Attention`, ``cache`` one for each name."""
        seen = {} if visible is None else {"visible": visible}
        outputs, found = [], {}
        for name, part in self._made(named=True).items():
            own = None if cache is None else cache[name]
            y, found[name] = part(x, positions, mask, own, train=train, capture=capture, **seen)
            outputs.append(y)
        return functools.reduce(jnp.add, outputs), nest(**found)

    @property
    def window(self) -> int | None:
        """The longest window of a part, or None: what decoding asks for (rows of different lengths)."""
        windows = [getattr(part, "window", None) for part in self._made().values()]
        return max(filter(None, windows), default=None)

    def cost(self, d_model: int, length: int) -> dict[str, Any]:
        """Prices of every part's events."""
        return {name: part.cost(d_model, length) for name, part in self._made().items()}

    def init_cache(self, d_model: int, batch: int, max_length: int) -> dict[str, Any]:
        """An empty cache of every part."""
        made = self._made().items()
        return {name: part.init_cache(d_model, batch, max_length) for name, part in made}

    def _made(self, *, named: bool = False) -> dict[str, Any]:
        own = lambda name: {"name": name} if named else {"parent": None}
        return {name: part(dtypes=self.dtypes, **own(name)) for name, part in self.parts.items()}
