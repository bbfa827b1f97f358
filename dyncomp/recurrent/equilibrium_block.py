"""A block of implicit depth: its output is the fixed point of a learned map."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.recurrent.cells import TanhCell
from dyncomp.recurrent.equilibrium import FixedPoint


class EquilibriumBlock(nn.Module):
    """z* = f(z*, x) (deep equilibrium model, Bai et al. 2019). Parameters: ``cell``.

    Controls: ``tolerance``, a run-time argument that sets each example's number of iterations. Events per example:
    ``evaluations`` of the map, one of them to apply it to the point found, and ``prepare``.

    Attributes:
      cell: factory of the map, called with ``dtypes``: ``prepared = cell(x, train)``, then ``cell.step(prepared, z)``,
        a static method; ``width``; ``cost(d_in)`` with ``evaluations`` and ``prepare``.
      how: how the point is found and differentiated.
      tolerance: initial value of the control.
    """

    cell: Factory = TanhCell
    how: FixedPoint = FixedPoint()
    tolerance: float = 1e-4
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.cell, "EquilibriumBlock.cell")
        if self.tolerance <= 0:
            raise DyncompError(f"EquilibriumBlock.tolerance={self.tolerance}: use more than 0")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array | np.ndarray, "b d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        start: Float[Array | np.ndarray, "b o"] | None = None,
    ) -> tuple[Float[Array, "b o"], Aux]:
        """The point; its plan (captured) are the `FixedStats`.

        Args:
          x: what the map reads.
          mask: [b], 0 for examples that only fill up the batch.
          train: moves what the cell moves.
          capture: "plan".
          start: where the iteration begins: zeros, or an earlier point of the same examples (warm start).
        """
        cell = self.cell(name="cell", dtypes=self.dtypes)
        tolerance = self.variable("controls", "tolerance", jnp.float32, self.tolerance).value
        prepared = cell(x, train)
        start = jnp.zeros((x.shape[0], cell.width), x.dtype) if start is None else start
        if self.is_initializing():
            return cell.step(prepared, start), Aux()
        z, stats = self.how(type(cell).step, prepared, start, tolerance.astype(x.dtype))
        real = jnp.ones(x.shape[:1], bool) if mask is None else mask.astype(bool)
        again = 0 if self.how.gradient == "unroll" else 1
        own = jnp.where(real, stats.needed + again, 0)
        events = {"evaluations": count(own, stats.executed + again), "prepare": count(real)}
        return z, Aux(events=events, plans={"solve": stats} if "plan" in capture else {})

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the point for one of x, without batch axis."""
        return (*shape[:-1], self.cell(dtypes=self.dtypes, parent=None).width)

    def cost(self, shape: tuple[int, ...]) -> dict[str, Cost]:
        """Prices for one example of x's shape without its batch axis."""
        table: Any = self.cell(dtypes=self.dtypes, parent=None).cost(shape[-1])
        return table
