"""Exit heads: a bank of classifiers, one after each block that may end the network."""

import itertools

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float, Int
from dyncomp_kernels._widths import sum_dtype

Exit = int | Int[Array, ""]
"""Which exit; as an array it is no part of the compiled program."""


class ExitHeads(nn.Module):
    """``y`` classifiers with stacked weights [y d c], linear or with one hidden layer, or one for all exits.

    Attributes:
      exits: y, how many exits there are before the final classifier.
      classes: c.
      hidden: width of a GELU layer between features and logits; 0 for a linear head.
      shared: one head reads the features of every exit (weights [1 d c]).
    """

    exits: int
    classes: int
    hidden: int = 0
    shared: bool = False
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if self.exits < 1 or self.classes < 2 or self.hidden < 0:
            raise DyncompError(
                f"ExitHeads: exits={self.exits}, classes={self.classes}, hidden={self.hidden}; "
                "use exits >= 1, classes >= 2, hidden >= 0"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, features: Float[Array, "*y b d"], index: Exit | None = None) -> Array:
        """Logits, float32 or more.

        Args:
          features: normalised features, [y b d] for all exits, or [b d] for exit ``index``.
          index: which exit runs alone (a segment of an executor needs one head only).

        Returns:
          [y b c], or [b c] when ``index`` is given.
        """
        x = features if index is None else features[None]
        if self.hidden:
            x = nn.gelu(self._linear("hidden", x, self.hidden, index)).astype(features.dtype)
        logits = self._linear("logits", x, self.classes, index)
        return logits if index is None else logits[0]

    def _linear(self, name: str, x: Array, width: int, index: Exit | None) -> Array:
        """A batch of products [y b i] x [y i o] with float32 result or more; exit ``index`` alone if given."""
        heads = 1 if self.shared else self.exits
        lecun = nn.initializers.variance_scaling(1.0, "fan_in", "normal", 1, 2, batch_axis=(0,))
        shape, dtype = (heads, x.shape[-1], width), self.dtypes.param
        kernel = param(self, f"{name}_kernel", lecun, shape, ("exits", "embed", None), dtype)
        zeros = nn.initializers.zeros_init()
        bias = param(self, f"{name}_bias", zeros, (heads, width), ("exits", None), dtype)
        if self.shared:
            kernel, bias = (jnp.broadcast_to(w, (x.shape[0], *w.shape[1:])) for w in (kernel, bias))
        elif index is not None:
            kernel, bias = (lax.dynamic_slice_in_dim(w, index, 1) for w in (kernel, bias))
        wide = sum_dtype(x.dtype)
        y = jnp.einsum("ybi,yio->ybo", x, kernel.astype(x.dtype), preferred_element_type=wide)
        return y + bias.astype(wide)[:, None]

    def cost(self, d_model: int) -> Cost:
        """Price of one example at one head."""
        widths = [d_model, *([self.hidden] if self.hidden else []), self.classes]
        flops = sum(2 * i * o for i, o in itertools.pairwise(widths))
        return Cost(flops, sum(widths) * self.dtypes.compute_itemsize)
