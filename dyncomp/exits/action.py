"""An exit head that acts: an LSTM over control steps, then one MLP for the pose and one for the gripper."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float


def lstm(
    x: Float[Array, "b t d"],
    state: Float[Array, "b 2 k"],
    kernel: Float[Array, "d z"],
    recurrent: Float[Array, "k z"],
    bias: Float[Array, "z"],
) -> tuple[Float[Array, "b t k"], Float[Array, "b 2 k"]]:
    """One layer over t steps (Hochreiter and Schmidhuber 1997); z = 4 k, gates in order input, forget, cell, output.

    Args:
      x: inputs.
      state: (h, c) before the first step, float32.
      kernel, recurrent, bias: of inputs and of h.

    Returns:
      h of every step, float32, and (h, c) after the last.
    """
    driven = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    driven = driven + bias.astype(jnp.float32)[None, None]

    def step(carry: tuple[Array, Array], gates: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        own = h.astype(x.dtype)
        gates = gates + jnp.matmul(
            own, recurrent.astype(x.dtype), preferred_element_type=jnp.float32
        )
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    (h, c), all_h = lax.scan(step, (state[:, 0], state[:, 1]), driven.swapaxes(0, 1))
    return all_h.swapaxes(0, 1), jnp.stack([h, c], axis=1)


class ActionHead(nn.Module):
    """Features of control steps to actions, with a memory (the policy head of DeeR-VLA, arXiv 2411.02359).

    The memory moves once for every step that is given, so a caller that only *asks* for an action throws the new state
    away. Dropout needs the stream "dropout" and only acts with ``train=True``.

    Attributes:
      pose: numbers of a pose, each in -1..1.
      hidden: width k of each LSTM layer.
      layers: LSTM layers.
      widths: hidden widths of both MLPs.
      dropout: before every layer of the MLPs.
      lstm_dropout: between LSTM layers.
    """

    pose: int = 6
    hidden: int = 1024
    layers: int = 4
    widths: Sequence[int] = (512, 256)
    dropout: float = 0.4
    lstm_dropout: float = 0.3
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        if min(self.pose, self.hidden, self.layers) < 1:
            raise DyncompError(
                f"ActionHead: pose={self.pose}, hidden={self.hidden}, layers={self.layers}; use 1 or more"
            )
        self.widths = tuple(self.widths)
        super().__post_init__()

    @property
    def state_size(self) -> int:
        """Numbers of a state: h and c of every layer."""
        return 2 * self.layers * self.hidden

    @nn.compact
    def __call__(
        self, features: Float[Array, "b t d"], state: Float[Array, "b s"], train: bool = False
    ) -> tuple[Float[Array, "b t a"], Float[Array, "b s"]]:
        """Actions and the state after the last step.

        Args:
          features: of t control steps.
          state: float32, zeros at the start of an episode.
          train: use dropout.

        Returns:
          float32 [b t pose + 1]: the pose, then the gripper's *logit* (its probability is the sigmoid); the new state.
        """
        b = features.shape[0]
        split, after = state.reshape(b, self.layers, 2, self.hidden), []
        x = features.astype(self.dtypes.compute)
        for index in range(self.layers):
            if index:
                x = nn.Dropout(self.lstm_dropout)(x, deterministic=not train)
            x, new = lstm(x, split[:, index], *self._lstm_weights(index, x.shape[-1]))
            x = x.astype(self.dtypes.compute)
            after.append(new)
        pose = jnp.tanh(self._mlp("pose", x, self.pose, train))
        gripper = self._mlp("gripper", x, 1, train)
        return jnp.concatenate([pose, gripper], axis=-1), jnp.stack(after, axis=1).reshape(b, -1)

    def _lstm_weights(self, index: int, width: int) -> tuple[Array, Array, Array]:
        # As torch.nn.LSTM starts: everything uniform within 1 / sqrt(hidden).
        k, dtype, name = self.hidden, self.dtypes.param, f"lstm_{index}"
        bound = 1.0 / math.sqrt(k)
        init = lambda key, shape, kind: jax.random.uniform(key, shape, kind, -bound, bound)
        kernel = param(self, f"{name}_kernel", init, (width, 4 * k), ("embed", "mlp"), dtype)
        recurrent = param(self, f"{name}_state", init, (k, 4 * k), ("embed", "mlp"), dtype)
        return kernel, recurrent, param(self, f"{name}_bias", init, (4 * k,), ("mlp",), dtype)

    def _mlp(self, name: str, x: Array, out: int, train: bool) -> Array:
        dtype, lecun, zeros = (
            self.dtypes.param,
            nn.initializers.lecun_normal(),
            nn.initializers.zeros_init(),
        )
        for index, width in enumerate((*self.widths, out)):
            x = nn.Dropout(self.dropout)(x, deterministic=not train)
            shape = (x.shape[-1], width)
            kernel = param(self, f"{name}_{index}_kernel", lecun, shape, ("embed", None), dtype)
            bias = param(self, f"{name}_{index}_bias", zeros, (width,), (None,), dtype)
            x = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
            x = x + bias.astype(jnp.float32)[None, None]
            if index < len(self.widths):
                x = jax.nn.relu(x).astype(self.dtypes.compute)
        return x

    def cost(self, d_model: int) -> Cost:
        """Price of one control step: products of the LSTM layers and of both MLPs."""
        k = self.hidden
        inner = [d_model, *[k] * (self.layers - 1)]
        flops = sum(2 * 4 * k * (width + k) for width in inner)
        for out in (self.pose, 1):
            flops += sum(2 * i * o for i, o in itertools.pairwise([k, *self.widths, out]))
        return Cost(flops, (d_model + 2 * self.state_size) * self.dtypes.compute_itemsize)
