"""Banks of experts: stacked weights and the pure functions of rows that every dispatch is written against.

A bank class goes into the seam `MoE.bank`. Beside the methods of `dyncomp.core.dispatch.Bank` it says how its
parameters are made, along which logical axes they may be split, and what a row costs.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float, Int
from dyncomp_kernels.grouped_matmul.api import Implementation, grouped_matmul
from dyncomp_kernels.grouped_matmul.xla import executed_rows
from dyncomp_kernels.grouped_swiglu.api import grouped_swiglu

INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
WIDE, NARROW = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")


def moved(d_model: int, hidden: int, dtypes: DTypes) -> int:
    """Bytes in and out of one row of an expert; weights are shared by the rows and not counted."""
    return (2 * d_model + hidden) * dtypes.compute_itemsize


@struct.dataclass
class SwiGLUBank:
    """e experts W_down(silu(W_gate x) * W_up x); implements `dyncomp.core.dispatch.Bank`.

    Attributes:
      gate, up: [e d f].
      down: [e f d].
    """

    gate: Float[Array, "e d f"]
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]
    axes: ClassVar = {"gate": WIDE, "up": WIDE, "down": NARROW}
    matmul: ClassVar[Implementation | None] = None

    @classmethod
    def create(cls, module: nn.Module, e: int, d: int, f: int, dtype: str) -> "SwiGLUBank":
        """The bank of ``module``'s parameters ``gate``, ``up`` and ``down``."""
        shapes = {"gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
        return cls(
            **{n: param(module, n, INIT, shape, cls.axes[n], dtype) for n, shape in shapes.items()}
        )

    @staticmethod
    def cost(d_model: int, hidden: int, dtypes: DTypes) -> Cost:
        """Price of one row: three matrix-vector products."""
        return Cost(6 * d_model * hidden, moved(d_model, hidden, dtypes))

    def grouped(
        self, rows: Float[Array, "m d"], group_sizes: Int[Array, "e"]
    ) -> Float[Array, "m d"]:
        """Contiguous rows of each expert in order; only those in use are multiplied."""
        if self.matmul is None:
            return grouped_swiglu(rows, self.gate, self.up, self.down, group_sizes)
        product = functools.partial(grouped_matmul, implementation=self.matmul)
        gate, up = (product(rows, weights, group_sizes) for weights in (self.gate, self.up))
        return product(jax.nn.silu(gate) * up, self.down, group_sizes)

    def batched(self, rows: Float[Array, "e c d"]) -> Float[Array, "e c d"]:
        """c rows for each expert."""
        gate = jnp.einsum("ecd,edf->ecf", rows, self.gate)
        up = jnp.einsum("ecd,edf->ecf", rows, self.up)
        return jnp.einsum("ecf,efd->ecd", jax.nn.silu(gate) * up, self.down)

    def gathered(
        self, rows: Float[Array, "n k d"], experts: Int[Array, "n k"]
    ) -> Float[Array, "n k d"]:
        """Each row with its own expert's weights, gathered."""
        gate = jnp.einsum("nkd,nkdf->nkf", rows, self.gate[experts])
        up = jnp.einsum("nkd,nkdf->nkf", rows, self.up[experts])
        return jnp.einsum("nkf,nkfd->nkd", jax.nn.silu(gate) * up, self.down[experts])

    def executed(self, group_sizes: Int[Array, "e"], rows: int) -> Int[Array, ""]:
        """Rows that `grouped` multiplies, block padding included (of the portable form)."""
        return executed_rows(group_sizes, rows)


@struct.dataclass
class MLPBank:
    """e experts W_down gelu(W_up x + b_up) + b_down (GShard, V-MoE, Tutel); tanh form of gelu.

    Attributes:
      up: [e d f]; up_bias: [e f].
      down: [e f d]; down_bias: [e d].
    """

    up: Float[Array, "e d f"]
    up_bias: Float[Array, "e f"]
    down: Float[Array, "e f d"]
    down_bias: Float[Array, "e d"]
    axes: ClassVar = {
        "up": WIDE,
        "up_bias": ("expert", "mlp"),
        "down": NARROW,
        "down_bias": ("expert", "embed"),
    }
    matmul: ClassVar[Implementation | None] = None

    @classmethod
    def create(cls, module: nn.Module, e: int, d: int, f: int, dtype: str) -> "MLPBank":
        """The bank of ``module``'s parameters ``up``, ``up_bias``, ``down`` and ``down_bias``."""
        shapes = {"up": (e, d, f), "up_bias": (e, f), "down": (e, f, d), "down_bias": (e, d)}
        zeros = nn.initializers.zeros_init()
        init = lambda name: zeros if "bias" in name else INIT
        return cls(
            **{n: param(module, n, init(n), s, cls.axes[n], dtype) for n, s in shapes.items()}
        )

    @staticmethod
    def cost(d_model: int, hidden: int, dtypes: DTypes) -> Cost:
        """Price of one row: two matrix-vector products."""
        return Cost(4 * d_model * hidden, moved(d_model, hidden, dtypes))

    def grouped(
        self, rows: Float[Array, "m d"], group_sizes: Int[Array, "e"]
    ) -> Float[Array, "m d"]:
        """Contiguous rows of each expert in order; only those in use are multiplied."""
        member = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
        member = jnp.minimum(member, group_sizes.shape[0] - 1)
        product = functools.partial(grouped_matmul, implementation=self.matmul)
        hidden = product(rows, self.up, group_sizes) + self.up_bias[member]
        return product(jax.nn.gelu(hidden), self.down, group_sizes) + self.down_bias[member]

    def batched(self, rows: Float[Array, "e c d"]) -> Float[Array, "e c d"]:
        """c rows for each expert."""
        hidden = jnp.einsum("ecd,edf->ecf", rows, self.up) + self.up_bias[:, None]
        return jnp.einsum("ecf,efd->ecd", jax.nn.gelu(hidden), self.down) + self.down_bias[:, None]

    def gathered(
        self, rows: Float[Array, "n k d"], experts: Int[Array, "n k"]
    ) -> Float[Array, "n k d"]:
        """Each row with its own expert's weights, gathered."""
        hidden = jnp.einsum("nkd,nkdf->nkf", rows, self.up[experts]) + self.up_bias[experts]
        down = jnp.einsum("nkf,nkfd->nkd", jax.nn.gelu(hidden), self.down[experts])
        return down + self.down_bias[experts]

    def executed(self, group_sizes: Int[Array, "e"], rows: int) -> Int[Array, ""]:
        """Rows that `grouped` multiplies, block padding included (of the portable form)."""
        return executed_rows(group_sizes, rows)
