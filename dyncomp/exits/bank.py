"""Heads and gates of all exits together: what plugs in between the blocks of a backbone."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float
from dyncomp.exits.gates import ExitGates
from dyncomp.exits.heads import Exit, ExitHeads


class ExitBank(nn.Module):
    """Exit heads with a gate each. Parameters: ``heads`` and ``gates``.

    Attributes:
      exits: y.
      classes: c.
      hidden, shared: see `ExitHeads`.
      gated: whether there are gates; a confidence rule needs none and is not charged for any.
    """

    exits: int
    classes: int
    hidden: int = 0
    shared: bool = False
    gated: bool = True
    dtypes: DTypes = DTypes()
    stacked = True  # parameters of all exits lie in one array, and the exit may be told as an array

    def setup(self):  # noqa: D102
        self.heads = self._heads()
        if self.gated:
            self.gates = ExitGates(self.exits, dtypes=self.dtypes)

    def _heads(self, **kwargs: Any) -> ExitHeads:
        return ExitHeads(self.exits, self.classes, self.hidden, self.shared, self.dtypes, **kwargs)

    def __call__(
        self, features: Float[Array, "*y b d"], index: Exit | None = None
    ) -> tuple[Array, Array]:
        """(logits [y b c], gate logits [y b]), float32 or more; without the leading axis when ``index`` is given.

        Gate logits are zeros when there are no gates. No gradient flows from a gate into its head.
        """
        logits = self.heads(features, index)
        if self.gated:
            return logits, self.gates(logits, index)
        return logits, jnp.zeros(logits.shape[:-1], logits.dtype)

    def cost(self, d_model: int) -> dict[str, Cost]:
        """Price of one example at one exit: ``heads`` and, if there are any, ``gates``."""
        table = {"heads": self._heads(parent=None).cost(d_model)}
        if self.gated:
            table["gates"] = ExitGates(self.exits, parent=None).cost(self.classes)
        return table
