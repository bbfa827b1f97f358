"""Controls: what a learned router has to beat, at equal compute."""

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
from dyncomp.routers.softmax import TopK


class Random(nn.Module):
    """Uniformly random distinct experts, each weighted 1/count: what a learned router has to beat.

    The key is drawn from the stream ``router`` while training and is fixed otherwise, so evaluation is reproducible;
    all layers then draw the same pattern.

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


class RandomFree(TopK):
    """`TopK` whose choice between networks and free experts is random; among the networks the scores still decide.

    How many of a row's k experts are networks is drawn from a histogram; they are the ones that score highest, the
    rest are random free experts. Gates are those of `TopK`. A control for routers over both kinds (`MoE.free`). The key
    is drawn from the stream ``router`` while training and is fixed otherwise, the same in all layers.

    Attributes:
      free_experts: how many of the last experts are free.
      histogram: relative frequency of 0, 1, ..., k networks in a row.
    """

    free_experts: int = 1
    histogram: Sequence[float] = (1.0, 1.0, 1.0)

    def check(self) -> None:
        """Refuses a histogram that does not fit."""
        super().check()
        networks = self.num_experts - self.free_experts
        if len(self.histogram) != self.k + 1 or sum(self.histogram) <= 0:
            raise DyncompError(
                f"RandomFree.histogram has {len(self.histogram)} entries for k={self.k}; give the frequencies of"
                " 0, 1, ... k networks"
            )
        if not self.k <= networks or (self.k > self.free_experts and self.histogram[0] > 0):
            raise DyncompError(
                f"RandomFree: k={self.k} does not fit {networks} networks and {self.free_experts} free experts"
            )

    def choose(self, logits: Float[Array, "n e"], mask: Array | None, train: bool) -> RoutePlan:
        """Masks what the draw leaves out; the k experts that are left are chosen."""
        key = self.make_rng("router") if train else jax.random.key(0)
        count_key, free_key = jax.random.split(key)
        shares = jnp.log(jnp.asarray(self.histogram, jnp.float32))
        n, networks = logits.shape[0], self.num_experts - self.free_experts
        count = jax.random.categorical(count_key, shares, shape=(n, 1))
        noise = jax.random.uniform(free_key, (n, self.free_experts))
        stays = jnp.concatenate(
            [_rank(logits[:, :networks]) < count, _rank(noise) < self.k - count], axis=-1
        )
        return super().choose(jnp.where(stays, logits, -jnp.inf), mask, train)


def _rank(scores: Float[Array, "n e"]) -> Array:
    """Place of each score in the descending order of its row."""
    return jnp.argsort(jnp.argsort(-scores, axis=-1), axis=-1)
