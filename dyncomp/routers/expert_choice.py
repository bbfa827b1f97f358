"""Experts choose their rows."""

import jax
import jax.numpy as jnp

from dyncomp.core import choose
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float
from dyncomp.routers.base import Scored


class ExpertChoice(Scored):
    """Each expert takes its C = n c / e best rows of every group of n (Zhou et al. 2022). Gates are raw probabilities.

    Load is even by construction, so no balance loss is needed. Not causal: never use it in a decoder that generates,
    for whether a token is taken depends on later ones.

    Attributes:
      capacity_factor: c, the mean number of experts per row.
      groups: equal parts of the rows, in order, that are served apart.
    """

    capacity_factor: float = 2.0
    groups: int = 1

    def check(self) -> None:
        """Refuses a capacity below nothing or above everything."""
        super().check()
        if not 0 < self.capacity_factor <= self.num_experts or self.groups < 1:
            raise DyncompError(
                f"ExpertChoice: capacity_factor={self.capacity_factor} must be in (0, num_experts={self.num_experts}]"
                f" and groups={self.groups} at least 1"
            )

    def slots(self, rows: int) -> int:
        """C of a group of ``rows``, at least 1; rounded half to even."""
        return max(1, min(rows, round(rows * self.capacity_factor / self.num_experts)))

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """The best rows of each expert in each group."""
        del train
        n, e = logits.shape
        if n % self.groups:
            raise DyncompError(f"ExpertChoice.groups={self.groups} does not divide {n} rows")
        rows = n // self.groups
        scores = jax.nn.softmax(logits, axis=-1).reshape(self.groups, rows, e)
        allowed = jnp.ones((n,), bool) if mask is None else mask.astype(bool)
        allowed = allowed.reshape(self.groups, rows)
        slots = self.slots(rows)
        plans = jax.vmap(lambda s, a: choose.expert_choice(s, slots, a))(scores, allowed)
        flat = jax.tree.map(lambda leaf: leaf.reshape(n, e), plans)
        return flat.replace(bound=self.groups * slots * e)
