"""Vector fields: small smooth networks of time and state, deterministic, with the shape of the state."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.norms import layer_norm
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

Times = Float[Array | np.ndarray, "b"]
Activation = Literal["tanh", "silu", "softplus", "relu"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
}


def check_activation(name: str) -> None:
    """Refuses an unknown activation."""
    if name not in ACTIVATIONS:
        raise DyncompError(f"activation={name!r}: use one of {', '.join(ACTIVATIONS)}")


class MLPField(nn.Module):
    """dz/dt of vectors: one hidden layer that reads z and t (Kidger 2022, ch. 2: smooth, time as an input).

    Attributes:
      hidden: f.
      activation: smooth ones suit methods of high order; "relu" is there for comparison.
      bound: a tanh at the end bounds the slope.
      gain: of the last layer's initial values; small ones start near the identity.
    """

    hidden: int
    activation: Activation = "tanh"
    bound: bool = False
    gain: float = 0.1
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Times, z: Float[Array | np.ndarray, "b d"]) -> Float[Array, "b d"]:
        """The slope at z and t."""
        t, z = jnp.asarray(t), jnp.asarray(z)
        d, dtype, zeros = z.shape[-1], self.dtypes.param, nn.initializers.zeros_init()
        lecun = nn.initializers.lecun_normal()
        last = nn.initializers.variance_scaling(self.gain**2, "fan_in", "truncated_normal")
        up = param(self, "up", lecun, (d, self.hidden), ("embed", "mlp"), dtype)
        time = param(self, "time", zeros, (self.hidden,), ("mlp",), dtype)
        bias = param(self, "bias", zeros, (self.hidden,), ("mlp",), dtype)
        down = param(self, "down", last, (self.hidden, d), ("mlp", "embed"), dtype)
        shift = param(self, "shift", zeros, (d,), ("embed",), dtype)
        up, time, bias, down, shift = (w.astype(z.dtype) for w in (up, time, bias, down, shift))
        y = z @ up + t.astype(z.dtype)[:, None] * time[None] + bias[None]
        y = ACTIVATIONS[self.activation](y) @ down + shift[None]
        return jnp.tanh(y) if self.bound else y

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One evaluation on one state of this shape: products, additions and one FLOP an activation."""
        (d,) = shape
        flops = 4 * d * self.hidden + 4 * self.hidden + d + d * self.bound
        weights = 2 * d * self.hidden + 2 * self.hidden + d
        moved = 2 * d * self.dtypes.compute_itemsize
        return Cost(flops, moved + weights * self.dtypes.param_itemsize)


class ConvField(nn.Module):
    """dz/dt of feature maps: two convolutions 3x3 that also read t, after a norm and a smooth activation each.

    The layout of the image experiments of Chen et al. 2018 (arXiv 1806.07366), with layer norms over channels in place
    of group norms and a smooth activation in place of ReLU (Kidger 2022, ch. 2).

    Attributes:
      hidden: channels between the convolutions; 0 takes those of the state.
      gain: as in `MLPField`.
    """

    hidden: int = 0
    activation: Activation = "softplus"
    gain: float = 0.1
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_activation(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, t: Times, z: Float[Array | np.ndarray, "b h w d"]
    ) -> Float[Array, "b h w d"]:
        """The slope at z and t."""
        t, z = jnp.asarray(t), jnp.asarray(z)
        d, hidden = z.shape[-1], self.hidden or z.shape[-1]
        y = self._conv("first", t, self._norm("first_norm", z), hidden, 1.0)
        return self._conv("second", t, self._norm("second_norm", y), d, self.gain)

    def _norm(self, name: str, x: Array) -> Array:
        d, ones = x.shape[-1], nn.initializers.ones_init()
        scale = param(self, f"{name}_scale", ones, (d,), ("embed",), self.dtypes.param)
        bias = param(
            self, f"{name}_bias", nn.initializers.zeros_init(), (d,), ("embed",), self.dtypes.param
        )
        return ACTIVATIONS[self.activation](layer_norm(x, scale, bias))

    def _conv(self, name: str, t: Array, x: Array, width: int, gain: float) -> Array:
        """The convolution of x with a channel that holds t, and a bias."""
        d, dtype = x.shape[-1], self.dtypes.param
        init = nn.initializers.variance_scaling(gain**2, "fan_in", "truncated_normal")
        axes = (None, None, None, "embed")
        kernel = param(self, name, init, (3, 3, d + 1, width), axes, dtype).astype(x.dtype)
        zeros = nn.initializers.zeros_init()
        bias = param(self, f"{name}_bias", zeros, (width,), ("embed",), dtype).astype(x.dtype)
        time = jnp.broadcast_to(t.astype(x.dtype)[:, None, None, None], (*x.shape[:-1], 1))
        y = lax.conv_general_dilated(
            jnp.concatenate([x, time], axis=-1), kernel, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + bias[None, None, None]

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One evaluation on one state [h w d]; zeros around the map count as inputs, norms as 8 FLOPs a value."""
        h, w, d = shape
        hidden = self.hidden or d
        weights = 9 * ((d + 1) * hidden + (hidden + 1) * d)
        flops = h * w * (2 * weights + 10 * (d + hidden))
        moved = 2 * h * w * (d + hidden) * self.dtypes.compute_itemsize
        return Cost(flops, moved + weights * self.dtypes.param_itemsize)
