"""Attention from one sequence to another: queries of a decoder, keys and values of what an encoder left."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention.attend import attend
from dyncomp.attention.attention import PAIR_BLOCK, pair_events
from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Bool, Float
from dyncomp_kernels.dense_matmul.api import dense_matmul


class Heads(nn.Module):
    """A projection to heads: [b t d] -> [b t h p]."""

    heads: int
    head_dim: int
    bias: bool
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t h p"]:
        """Projects every position."""
        shape, dtype = (x.shape[-1], self.heads, self.head_dim), self.dtypes.param
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        kernel = param(self, "kernel", init, shape, ("embed", "heads", "head_dim"), dtype)
        y = dense_matmul(x, kernel.astype(x.dtype))
        if self.bias:
            zeros = nn.initializers.zeros_init()
            shift = param(self, "bias", zeros, shape[1:], ("heads", "head_dim"), dtype)
            y = y + shift.astype(x.dtype)[None, None]
        return constrain(y, ("batch", "seq", "heads", None))


class Joined(nn.Module):
    """Heads back to the width: [b t h p] -> [b t d]."""

    width: int
    bias: bool
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, mixed: Float[Array, "b t h p"]) -> Float[Array, "b t d"]:
        """Projects every position."""
        h, p = mixed.shape[2:]
        dtype, axes = self.dtypes.param, ("heads", "head_dim", "embed")
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        kernel = param(self, "kernel", init, (h, p, self.width), axes, dtype)
        y = dense_matmul(mixed, kernel.astype(mixed.dtype), axes=2)
        if self.bias:
            shift = param(
                self, "bias", nn.initializers.zeros_init(), (self.width,), ("embed",), dtype
            )
            y = y + shift.astype(y.dtype)[None, None]
        return y


class CrossAttention(nn.Module):
    """Multi-head attention whose keys and values come from a memory, with no sign of position (Vaswani et al. 2017).

    Keys and values can be made once (`keys_values`) and read by many steps (`read`).

    Events: ``projections`` (a token's query and output), ``memory`` (a memory position's key and value),
    ``pair_blocks`` and ``pairs`` (of `attention.Attention`).

    Attributes:
      d_model: d, of both sequences.
      heads: h, a divisor of d.
      bias: biases on all four projections.
    """

    d_model: int
    heads: int
    bias: bool = False
    dtypes: DTypes = DTypes()

    def setup(self):  # noqa: D102
        if self.d_model % self.heads:
            raise DyncompError(
                f"CrossAttention: d_model={self.d_model} is not a multiple of heads={self.heads}"
            )
        own = self.heads, self.d_model // self.heads, self.bias, self.dtypes
        self.q, self.k, self.v = Heads(*own), Heads(*own), Heads(*own)
        self.out = Joined(self.d_model, self.bias, self.dtypes)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        memory: Float[Array, "b s d"],
        seen: Bool[Array, "b s"] | None = None,
        mask: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Every position of x reads the memory.

        Args:
          seen: False for padding of the memory.
          mask: [b t], 1 (or True) for real positions of x; only counted.
        """
        keys, values = self.keys_values(memory)
        y, aux = self.read(x, keys, values, seen, mask)
        b, s = memory.shape[:2]
        rows = b * s if seen is None else jnp.sum(seen, dtype=jnp.int32)
        return y, Aux(events={**aux.events, "memory": count(rows, b * s)})

    def keys_values(
        self, memory: Float[Array, "b s d"]
    ) -> tuple[Float[Array, "b s h p"], Float[Array, "b s h p"]]:
        """Keys and values of a memory."""
        return self.k(memory), self.v(memory)

    def read(
        self,
        x: Float[Array, "b t d"],
        keys: Float[Array, "b s h p"],
        values: Float[Array, "b s h p"],
        seen: Bool[Array, "b s"] | None = None,
        mask: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Reads keys and values that are there; arguments as in a call."""
        (b, t), s = x.shape[:2], keys.shape[1]
        allowed = None if seen is None else jnp.broadcast_to(seen[:, None, :], (b, t, s))
        y = self.out(attend(self.q(x), keys, values, allowed))
        own = jnp.full((b,), t, jnp.int32)
        own = own if mask is None else jnp.sum(mask.astype(bool), axis=1, dtype=jnp.int32)
        slots = jnp.int32(s) if seen is None else jnp.sum(seen, axis=1, dtype=jnp.int32)
        pairs = pair_events(own * slots, t * s)
        return y, Aux(events={"projections": count(jnp.sum(own), b * t), **pairs})

    def cost(self) -> dict[str, Cost]:
        """Price of each event."""
        d, item = self.d_model, self.dtypes.compute_itemsize
        each = Cost(4 * d * d, 4 * d * item)
        pair = Cost(4 * d)
        prices: dict[str, Any] = {"projections": each, "memory": each}
        return {**prices, "pair_blocks": pair * PAIR_BLOCK, "pairs": pair}
