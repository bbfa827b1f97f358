"""Routers that learn nothing: by hash of the token, or as they are told. Controls, and what oracles enumerate."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float, Int

TOKENS = "tokens"
"""Name, in the state that blocks hand up the depth, of the token ids that `Hash` reads."""


class Hash(nn.Module):
    """k experts fixed by the token's id (Roller et al. 2021, with a random hash in the place of a table).

    Every layer hashes with a salt of its own, int32, kept in the controls. Gates are 1/k; no parameters, no losses.

    Attributes:
      num_experts: e.
      k: experts per token; they are distinct.
    """

    num_experts: int
    k: int = 1
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n d"],
        mask: Array | None = None,
        train: bool = False,
        below: dict[str, Array] | None = None,
    ) -> tuple[RoutePlan, dict[str, Array]]:
        """The plan; ``below["tokens"]`` int32 [n] are the ids of the rows."""
        del train
        if not 1 <= self.k <= self.num_experts:
            raise DyncompError(
                f"Hash.k={self.k} with num_experts={self.num_experts}: use 1..{self.num_experts}"
            )
        tokens = self.below_like(x.shape[0])[TOKENS] if below is None else below[TOKENS]
        salt = self.variable("controls", "salt", self._draw).value
        first = mixed(tokens, salt) % jnp.uint32(self.num_experts)
        slots = jnp.arange(self.k, dtype=jnp.uint32)
        experts = ((first[:, None] + slots) % jnp.uint32(self.num_experts)).astype(jnp.int32)
        weights = jnp.full(experts.shape, 1.0 / self.k, jnp.float32)
        plan = RoutePlan(experts, weights, jnp.ones(experts.shape, bool))
        return (plan if mask is None else plan.masked(mask)), {}

    def _draw(self) -> Array:
        return jax.random.randint(self.make_rng("params"), (), 0, 2**31 - 1, jnp.int32)

    def below_like(self, rows: int) -> dict[str, Array]:
        """Asks the model for token ids."""
        return {TOKENS: jnp.zeros((rows,), jnp.int32)}

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Hashing costs no matrix product."""
        del d_model
        return {"rows": Cost(0, 0)}


def mixed(tokens: Int[Array, "n"], salt: Int[Array, ""]) -> Any:
    """A uint32 hash [n] of ids and salt (the finaliser of MurmurHash3), the same on every platform."""
    h = tokens.astype(jnp.uint32) ^ (salt.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * jnp.uint32(factor)
    return h ^ (h >> 16)


class Given(nn.Module):
    """Every row uses the expert that the control ``choice`` names, with gate 1.

    What an oracle enumerates: set the control (int32, one number a layer, or one a row), run the network; nothing is
    recompiled while the shape stays.

    Attributes:
      num_experts: e.
      choice: the control's first value.
    """

    num_experts: int
    choice: int = 0
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], mask: Array | None = None, train: bool = False
    ) -> tuple[RoutePlan, dict[str, Array]]:
        """The plan; reports no losses."""
        del train
        if not 0 <= self.choice < self.num_experts:
            raise DyncompError(
                f"Given.choice={self.choice} with num_experts={self.num_experts}: use 0..{self.num_experts - 1}"
            )
        choice = self.variable("controls", "choice", lambda: jnp.int32(self.choice)).value
        experts = jnp.broadcast_to(jnp.reshape(choice, (-1, 1)), (x.shape[0], 1)).astype(jnp.int32)
        ones = jnp.ones(experts.shape, bool)
        plan = RoutePlan(experts, ones.astype(jnp.float32), ones)
        return (plan if mask is None else plan.masked(mask)), {}

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Nothing is computed."""
        del d_model
        return {"rows": Cost(0, 0)}
