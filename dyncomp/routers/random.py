"""A control: experts drawn at random, as many per row as a given histogram says."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core import choose
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Float


class Random(nn.Module):
    """Uniformly random distinct experts, each weighted 1/count: what a learned router has to beat.

    The key is drawn from the stream ``router`` while training and is fixed otherwise, so evaluation is reproducible.

    Attributes:
      num_experts: e.
      histogram: relative frequency of 1, 2, ... experts per row; at most e entries.
    """

    num_experts: int
    histogram: Sequence[float] = (0.0, 1.0)
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n d"], mask: Array | None = None, train: bool = False
    ) -> tuple[RoutePlan, dict[str, Float[Array, ""]]]:
        """A random plan; reports no losses."""
        if not 1 <= len(self.histogram) <= self.num_experts or sum(self.histogram) <= 0:
            raise DyncompError(
                f"Random.histogram has {len(self.histogram)} entries for num_experts={self.num_experts};"
                " give the frequencies of 1, 2, ... experts"
            )
        key = self.make_rng("router") if train else jax.random.key(0)
        count_key, slot_key = jax.random.split(key)
        logits = jnp.log(jnp.asarray(self.histogram, jnp.float32))
        counts = 1 + jax.random.categorical(count_key, logits, shape=(x.shape[0],)).astype(
            jnp.int32
        )
        plan = choose.random_slots(
            slot_key, counts, self.num_experts, max_slots=len(self.histogram)
        )
        return (plan if mask is None else plan.masked(mask)), {}

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Drawing costs no matrix product."""
        del d_model
        return {"rows": Cost(0, 0)}
