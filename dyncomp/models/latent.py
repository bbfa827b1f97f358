"""A few latent tokens beside a feature map: they read it, think, shrink, and write back (Dynamic Perceiver).

Perceiver's attention layers (Jaegle et al. 2021, arXiv 2107.14795) as arXiv 2306.11248 and its released code use them.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention.depthwise import DepthwiseConv
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float
from dyncomp.experts.ffn import MLP
from dyncomp.models.bottlenecks import Size, adaptive_pool
from dyncomp.models.dense import Dense
from dyncomp.models.norm import Norm


class LatentTokens(nn.Module):
    """Learned tokens, the same for every example; N(0, 0.02) at first.

    Attributes:
      tokens, width: t and d.
    """

    tokens: int
    width: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, batch: int) -> Float[Array, "b t d"]:
        """For so many examples, of the compute dtype."""
        shape, init = (self.tokens, self.width), nn.initializers.normal(0.02)
        z = param(self, "tokens", init, shape, (None, "embed"), self.dtypes.param)
        return jnp.broadcast_to(z.astype(self.dtypes.compute)[None], (batch, *shape))


class AttentionLayer(nn.Module):
    """q + O(attention(LN q, LN kv)), then y + MLP(LN y); without ``kv`` the tokens attend to themselves.

    Queries, keys and values are projected without bias, the result with one; logits are scaled by head_dim^-0.5. The
    position code is a learned table added to the projected *keys* (zeros at first), not a bias of the logits.

    Attributes:
      heads: h.
      width: of queries, keys and values together; 0 for the queries' own.
      widening: hidden width of the MLP over the queries' width.
      positions: keys that have a place in the table; 0 for no table.
    """

    heads: int = 1
    width: int = 0
    widening: int = 1
    positions: int = 0
    eps: float = 1e-5
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self, q: Float[Array, "b t d"], kv: Float[Array, "b s _"] | None = None
    ) -> Float[Array, "b t d"]:
        """The queries, changed.

        Raises:
          DyncompError: heads that do not divide the width, or a table for another number of keys.
        """
        norm = lambda name: Norm("layer", self.eps, self.dtypes, name=name)
        own = norm("norm")(q)
        y = q + self._attend(own, own if kv is None else norm("kv_norm")(kv))
        hidden = self.widening * q.shape[-1]
        change, _ = MLP(hidden, dtypes=self.dtypes, name="mlp")(norm("mlp_norm")(y))
        return y + change

    def _attend(self, q: Array, kv: Array) -> Array:
        width = self._width(q.shape[-1])
        dense = lambda name, size, bias: Dense(size, bias, self.dtypes, name=name)
        queries, keys = dense("query", width, False)(q), dense("key", width, False)(kv)
        values = dense("value", width, False)(kv)
        if self.positions:
            if self.positions != kv.shape[1]:
                raise DyncompError(f"positions={self.positions} for {kv.shape[1]} keys")
            zeros, shape = nn.initializers.zeros_init(), (self.positions, width)
            table = param(self, "positions_table", zeros, shape, (None, "embed"), self.dtypes.param)
            keys = keys + table.astype(keys.dtype)[None]
        apart = lambda x: x.reshape(*x.shape[:2], self.heads, width // self.heads)
        queries, keys, values = apart(queries), apart(keys), apart(values)
        scale = jnp.float32((width // self.heads) ** -0.5)
        logits = jnp.einsum("bthp,bshp->bhts", queries, keys, preferred_element_type="float32")
        weights = jax.nn.softmax(logits * scale, axis=-1).astype(values.dtype)
        y = jnp.einsum("bhts,bshp->bthp", weights, values)
        return dense("out", q.shape[-1], True)(y.reshape(*y.shape[:2], width))

    def _width(self, d_model: int) -> int:
        width = self.width or d_model
        if self.heads < 1 or width % self.heads:
            raise DyncompError(f"AttentionLayer: heads={self.heads} do not divide width={width}")
        return width

    def cost(self, tokens: int, d_model: int, keys: int, key_width: int) -> Cost:
        """Price of one example: projections, both products of attention, the MLP."""
        width = self._width(d_model)
        projected = tokens * d_model + 2 * keys * key_width + tokens * d_model
        flops = 2 * width * projected + 4 * tokens * keys * width
        mlp = MLP(self.widening * d_model, dtypes=self.dtypes, parent=None).cost(d_model)
        moved = (2 * tokens * d_model + keys * key_width) * self.dtypes.compute_itemsize
        return Cost(flops, moved) + mlp["tokens"] * tokens


class ReadFeatures(nn.Module):
    """Latent tokens read a feature map ("X2Z"): x + depthwise 7x7(x), means over a grid, one head of attention.

    Attributes:
      side: of the grid of keys.
      kernel: side of the depthwise convolution.
    """

    side: int = 7
    kernel: int = 7
    dtypes: DTypes = DTypes()

    def _layer(self, **kwargs) -> AttentionLayer:
        return AttentionLayer(positions=self.side**2, dtypes=self.dtypes, **kwargs)

    @nn.compact
    def __call__(
        self, z: Float[Array, "b t d"], x: Float[Array, "b h w _"]
    ) -> Float[Array, "b t d"]:
        """The tokens, changed."""
        b, h, w, d = x.shape
        conv = DepthwiseConv(self.kernel, (h, w), self.dtypes, name="conv")
        x = x + conv(x.reshape(b, h * w, d)).reshape(x.shape)
        return self._layer(name="attention")(z, adaptive_pool(x, self.side).reshape(b, -1, d))

    def cost(self, tokens: int, d_model: int, size: Size) -> Cost:
        """Price of one example with a map of that size: convolution, pooling, attention."""
        h, w, d = size
        conv = DepthwiseConv(self.kernel, dtypes=self.dtypes, parent=None).cost(d) * (h * w)
        pool = Cost(0 if (h, w) == (self.side, self.side) else h * w * d)
        layer = self._layer(parent=None).cost(tokens, d_model, self.side**2, d)
        return conv + pool + layer


class WriteFeatures(nn.Module):
    """Every place of a feature map reads the latent tokens ("Z2X"): one head of an eighth of the channels."""

    dtypes: DTypes = DTypes()

    def _layer(self, d_model: int, **kwargs) -> AttentionLayer:
        return AttentionLayer(width=max(1, d_model // 8), dtypes=self.dtypes, **kwargs)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w d"], z: Float[Array, "b t _"]
    ) -> Float[Array, "b h w d"]:
        """The map, changed."""
        b, h, w, d = x.shape
        return self._layer(d, name="attention")(x.reshape(b, h * w, d), z).reshape(x.shape)

    def cost(self, size: Size, tokens: int, token_width: int) -> Cost:
        """Price of one map of that size."""
        h, w, d = size
        return self._layer(d, parent=None).cost(h * w, d, tokens, token_width)


class TokenMixer(nn.Module):
    """Fewer tokens of another width: LN and a product along the tokens, then LN and a product along the channels.

    Attributes:
      tokens, width: of the result.
    """

    tokens: int
    width: int
    eps: float = 1e-5
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, z: Float[Array, "b _ _"]) -> Float[Array, "b t d"]:
        """Tokens [b t d]."""
        norm = lambda name: Norm("layer", self.eps, self.dtypes, name=name)
        z = jnp.swapaxes(z, 1, 2)
        z = Dense(self.tokens, dtypes=self.dtypes, name="tokens_out")(norm("token_norm")(z))
        z = jnp.swapaxes(z, 1, 2)
        return Dense(self.width, dtypes=self.dtypes, name="channels_out")(norm("channel_norm")(z))

    def cost(self, tokens: int, width: int) -> Cost:
        """Price of one example with so many tokens of that width."""
        flops = 2 * tokens * self.tokens * width + 2 * self.tokens * width * self.width
        moved = tokens * width + self.tokens * self.width
        return Cost(flops, moved * self.dtypes.compute_itemsize)
