"""Banks of experts: stacked weights and the pure functions of rows that every dispatch is written against."""

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.core.typing import Array, Float, Int
from dyncomp_kernels.grouped_matmul.api import grouped_matmul
from dyncomp_kernels.grouped_matmul.xla import executed_rows


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

    def grouped(
        self, rows: Float[Array, "m d"], group_sizes: Int[Array, "e"]
    ) -> Float[Array, "m d"]:
        """Contiguous rows of each expert in order; only those in use are multiplied."""
        gate = grouped_matmul(rows, self.gate, group_sizes)
        up = grouped_matmul(rows, self.up, group_sizes)
        return grouped_matmul(jax.nn.silu(gate) * up, self.down, group_sizes)

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
