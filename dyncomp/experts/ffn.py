"""Dense feed-forward units on the ffn seam."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import Aux, Count, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Float
from dyncomp_kernels.dense_matmul.api import dense_matmul

Activation = Literal["gelu", "relu", "silu"]
INIT = nn.initializers.lecun_normal()


def token_events(x: Float[Array, "b t d"], mask: Array | None) -> dict[str, Count]:
    """One event a token: needed for real ones, executed for all."""
    tokens = x.shape[0] * x.shape[1]
    needed = tokens if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
    return {"tokens": count(needed, tokens)}


def _bytes(d_model: int, hidden: int, dtypes: DTypes) -> int:
    """Activations in and out of one token; weights are shared by the batch and not counted per token."""
    return (2 * d_model + hidden) * dtypes.compute_itemsize


class SwiGLU(nn.Module):
    """W_down(silu(W_gate x) * W_up x) without biases (Shazeer 2020; Llama).

    Attributes:
      hidden: f.
    """

    hidden: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Applies the unit to every position."""
        d, f, dtype = x.shape[-1], self.hidden, self.dtypes.param
        gate = param(self, "gate", INIT, (d, f), ("embed", "mlp"), dtype).astype(x.dtype)
        up = param(self, "up", INIT, (d, f), ("embed", "mlp"), dtype).astype(x.dtype)
        down = param(self, "down", INIT, (f, d), ("mlp", "embed"), dtype).astype(x.dtype)
        h = constrain(
            jax.nn.silu(dense_matmul(x, gate)) * dense_matmul(x, up), ("batch", "seq", "mlp")
        )
        return dense_matmul(h, down), Aux(events=token_events(x, mask))

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of one token: three matrix-vector products."""
        return {
            "tokens": Cost(6 * d_model * self.hidden, _bytes(d_model, self.hidden, self.dtypes))
        }


class MLP(nn.Module):
    """W_2 act(W_1 x + b_1) + b_2 (Vaswani et al. 2017, eq. 2).

    Attributes:
      hidden: f.
      activation: "gelu" (tanh form), "relu" or "silu".
    """

    hidden: int
    activation: Activation = "gelu"
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Applies the unit to every position."""
        if self.activation not in ("gelu", "relu", "silu"):
            raise DyncompError(f"MLP.activation={self.activation!r}: use 'gelu', 'relu' or 'silu'")
        d, f, dtype = x.shape[-1], self.hidden, self.dtypes.param
        zeros = nn.initializers.zeros_init()
        up = param(self, "up", INIT, (d, f), ("embed", "mlp"), dtype).astype(x.dtype)
        up_bias = param(self, "up_bias", zeros, (f,), ("mlp",), dtype).astype(x.dtype)
        down = param(self, "down", INIT, (f, d), ("mlp", "embed"), dtype).astype(x.dtype)
        down_bias = param(self, "down_bias", zeros, (d,), ("embed",), dtype).astype(x.dtype)
        h = getattr(jax.nn, self.activation)(dense_matmul(x, up) + up_bias[None, None])
        y = dense_matmul(constrain(h, ("batch", "seq", "mlp")), down) + down_bias[None, None]
        return y, Aux(events=token_events(x, mask))

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of one token: two matrix-vector products."""
        return {
            "tokens": Cost(4 * d_model * self.hidden, _bytes(d_model, self.hidden, self.dtypes))
        }
