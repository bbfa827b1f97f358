"""Exits of convolutional networks: internal classifiers that reduce a map themselves (Shallow-Deep Networks)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float


def window_of(length: int, side: int) -> tuple[int, int]:
    """(window, windows): the smallest window of which at most ``side`` cover ``length`` places."""
    window = -(-length // side)
    return window, -(-length // window)


def mixed_pool(
    x: Float[Array, "b _ _ d"], mix: Float[Array, ""], side: int
) -> Float[Array, "b _ _ d"]:
    """mix * maximum + (1 - mix) * mean over windows, at most ``side`` of them a way (Lee et al. 2016).

    The last window of a way may be smaller: what lies outside of the map counts in neither.
    """
    b, h, w, d = x.shape
    (high, rows), (wide, columns) = window_of(h, side), window_of(w, side)
    pad = ((0, 0), (0, rows * high - h), (0, columns * wide - w), (0, 0))

    def windows(values: Array, outside: float) -> Array:
        padded = jnp.pad(values, pad, constant_values=outside)
        return padded.reshape(-1, rows, high, columns, wide, values.shape[-1])

    real = jnp.sum(windows(jnp.ones((1, h, w, 1), x.dtype), 0.0), axis=(2, 4))
    mean = jnp.sum(windows(x, 0.0), axis=(2, 4)) / real
    most = jnp.max(windows(x, -jnp.inf), axis=(2, 4))
    mix = mix.astype(x.dtype)
    return mix * most + (1 - mix) * mean


class MapExit(nn.Module):
    """One internal classifier: mixed pooling to a small grid, then a linear layer (Kaya et al. 2019, sec. 4).

    Attributes:
      classes: c.
      side: the grid has at most side x side places; a smaller map is read as it is.
    """

    classes: int
    side: int = 4
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _ _ d"]) -> Float[Array, "b c"]:
        """Logits, float32."""
        dtype, zeros = self.dtypes.param, nn.initializers.zeros_init()
        if max(x.shape[1:3]) > self.side:
            # Learned, and like the released code's not kept within 0..1.
            mix = param(self, "mix", nn.initializers.uniform(1.0), (), (), dtype)
            x = mixed_pool(x, mix, self.side)
        x = x.reshape(x.shape[0], -1)
        shape = (x.shape[-1], self.classes)
        lecun = nn.initializers.lecun_normal()
        kernel = param(self, "kernel", lecun, shape, ("embed", None), dtype)
        bias = param(self, "bias", zeros, shape[1:], (None,), dtype)
        y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        return y + bias.astype(jnp.float32)[None]

    def cost(self, rows: int, columns: int, d_model: int) -> Cost:
        """Price of one map: a comparison and an addition a place, the mixing, the products."""
        moved, flops = rows * columns * d_model, 0
        if max(rows, columns) > self.side:
            flops += 2 * moved
            rows, columns = window_of(rows, self.side)[1], window_of(columns, self.side)[1]
            flops += 4 * rows * columns * d_model
        flops += 2 * rows * columns * d_model * self.classes
        return Cost(flops, moved * self.dtypes.compute_itemsize + self.classes * 4)


class MapExits(nn.Module):
    """Internal classifiers after all blocks but the last; no gates. Parameters: ``exit_i``.

    Attributes:
      exits: y.
      classes: c.
      side: see `MapExit`.
    """

    exits: int
    classes: int
    side: int = 4
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.exits < 1 or self.classes < 2 or self.side < 1:
            raise DyncompError(
                f"MapExits: exits={self.exits}, classes={self.classes}, side={self.side}; "
                "use exits >= 1, classes >= 2, side >= 1"
            )
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.exit = [MapExit(self.classes, self.side, self.dtypes) for _ in range(self.exits)]

    def __call__(
        self,
        features: Sequence[Float[Array, "b _ _ _"]] | Float[Array, "b _ _ _"],
        index: int | None = None,
    ) -> tuple[Array, Array]:
        """(logits [y b c], gate logits [y b], zeros), float32; without the leading axis for exit ``index`` alone.

        Args:
          features: a map for every exit, their shapes may differ; one map when ``index`` is given.
          index: static.
        """
        if index is None:
            logits = jnp.stack([run(x) for run, x in zip(self.exit, features, strict=True)])
        else:
            logits = self.exit[index](jnp.asarray(features))
        return logits, jnp.zeros(logits.shape[:-1], jnp.float32)

    def cost(self, rows: int, columns: int, d_model: int) -> dict[str, Cost]:
        """Price of one example at an exit that reads a map [rows columns d]."""
        one = MapExit(self.classes, self.side, self.dtypes, parent=None)
        return {"heads": one.cost(rows, columns, d_model)}

    @staticmethod
    def weights_of(params: Mapping[str, Any], index: int | None) -> dict[str, Any]:
        """The parameters that exit ``index`` uses; none before the first and after the last block."""
        return {name: value for name, value in params.items() if name == f"exit_{index}"}
