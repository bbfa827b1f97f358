"""Experts without a feed-forward network (MoE++, arXiv 2410.07348, sec. 3.1): zero, copy and constant."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Float

Kind = Literal["constant", "copy", "zero"]


class FreeExperts(nn.Module):
    """The weighted outputs of experts that cost next to nothing; computed for every row, wherever it is.

    zero: 0. copy: x. constant: a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x), each with its own W_c [d 2], no bias,
    and v [d] drawn from N(0, 1).

    Attributes:
      kinds: of the experts, in the order of their indices.
      first: index of the first one in the plan; the experts before have networks.
    """

    kinds: Sequence[Kind]
    first: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], plan: RoutePlan) -> Float[Array, "n d"]:
        """Sum over the free experts of each row of weight times output."""
        gates = plan.one_hot(self.first + len(self.kinds))[:, self.first :]
        scale = jnp.zeros((x.shape[0],), jnp.float32)
        y = jnp.zeros(x.shape, jnp.float32)
        for index, kind in enumerate(self.kinds):
            gate = gates[:, index]
            if kind == "copy":
                scale = scale + gate
            elif kind == "constant":
                keep, replace, value = self._constant(x, index)
                scale = scale + gate * keep
                y = y + (gate * replace)[:, None] * value[None]
        return (y + scale[:, None] * x.astype(jnp.float32)).astype(x.dtype)

    def _constant(self, x: Array, index: int) -> tuple[Array, Array, Array]:
        """a_1 [n], a_2 [n] and v [d] of the constant expert ``index``, float32."""
        d, dtype = x.shape[-1], self.dtypes.param
        lecun, normal = nn.initializers.lecun_normal(), nn.initializers.normal(1.0)
        mix = param(self, f"mix_{index}", lecun, (d, 2), ("embed", "router"), dtype)
        value = param(self, f"value_{index}", normal, (d,), ("embed",), dtype)
        logits = jnp.dot(x.astype(jnp.float32), mix.astype(jnp.float32))
        shares = jax.nn.softmax(logits, axis=-1)
        return shares[:, 0], shares[:, 1], value.astype(jnp.float32)

    def cost(self, d_model: int) -> Cost:
        """Price of one row through all of them: constants two products with W_c and three vector sums, copies one."""
        flops = {"constant": 4 * d_model + 4 * d_model, "copy": 2 * d_model, "zero": 0}
        return Cost(sum(flops[kind] for kind in self.kinds), 0)


def check_kinds(kinds: Any) -> tuple[Kind, ...]:
    """The kinds as a tuple.

    Raises:
      DyncompError: an unknown kind.
    """
    for kind in kinds:
        if kind not in ("constant", "copy", "zero"):
            raise DyncompError(
                f"MoE.free={list(kinds)}: use 'constant', 'copy' or 'zero', not {kind!r}"
            )
    return tuple(kinds)
