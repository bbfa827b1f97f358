"""Attention to other tokens of any width: a text that looks at pictures."""

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention.attend import attend
from dyncomp.attention.cross import Heads, Joined
from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float


class MediaAttention(nn.Module):
    """Queries from x, keys and values from other tokens; no biases, no positions (Vaswani et al. 2017, sec. 3.2).

    Attributes:
      heads: h.
      head_dim: p; None for d / h.
    """

    heads: int
    head_dim: int | None = None
    dtypes: DTypes = DTypes()

    def width(self, d_model: int) -> int:
        """h p.

        Raises:
          DyncompError: the heads do not divide the width.
        """
        if self.head_dim is None and d_model % self.heads:
            raise DyncompError(
                f"MediaAttention: d_model={d_model} is not a multiple of heads={self.heads}; set head_dim"
            )
        return self.heads * (self.head_dim or d_model // self.heads)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], media: Float[Array, "b s m"], mask: Array | None = None
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """What each position of x reads.

        Args:
          x: who reads.
          media: what is read, of any width.
          mask: [b t], 0 for positions of x that are padding: computed, but not needed.
        """
        (b, t, d), s = x.shape, media.shape[1]
        head_dim = self.width(d) // self.heads
        own = self.heads, head_dim, False, self.dtypes
        q = Heads(*own, name="q")(x)
        k, v = (Heads(*own, name=name)(media) for name in ("k", "v"))
        y = Joined(d, False, self.dtypes, name="out")(attend(q, k, v, None))
        real = b * t if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
        events = {
            "tokens": count(real, b * t),
            "media": count(b * s),
            "seen_pairs": count(jnp.asarray(real, jnp.int32) * s, b * t * s),
        }
        return y, Aux(events=events)

    def cost(self, d_model: int, media_width: int) -> dict[str, Cost]:
        """Price of a reading position (query and output), of a read token (key and value), and of a pair."""
        width, item = self.width(d_model), self.dtypes.compute_itemsize
        return {
            "tokens": Cost(4 * d_model * width, 2 * (d_model + width) * item),
            "media": Cost(4 * media_width * width, (media_width + 2 * width) * item),
            "seen_pairs": Cost(4 * width),
        }
