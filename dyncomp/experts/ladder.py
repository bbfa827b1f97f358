"""Feed-forward modules of several widths behind one router: big, small, or none (the ffn seam)."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from dyncomp.core import dispatch
from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.experts.bank import moved
from dyncomp.experts.ffn import INIT
from dyncomp.experts.local import on_own_rows
from dyncomp_kernels.grouped_matmul.xla import executed_rows
from dyncomp_kernels.grouped_swiglu.api import grouped_swiglu

Weights = tuple[Array, Array, Array] | None
"""gate [d f], up [d f], down [f d] of one module; None for a module that is skipped."""


@struct.dataclass
class LadderBank:
    """SwiGLU modules of different widths; implements `dyncomp.core.dispatch.Bank`.

    Attributes:
      modules: one `Weights` each, in the order of the alternatives.
    """

    modules: tuple[Weights, ...]

    def grouped(
        self, rows: Float[Array, "m d"], group_sizes: Int[Array, "e"]
    ) -> Float[Array, "m d"]:
        """Contiguous rows of each module in order; each module multiplies only its own."""
        starts = jnp.cumsum(group_sizes) - group_sizes
        out = jnp.zeros_like(rows)
        for index, weights in enumerate(self.modules):
            if weights is None:
                continue
            size = group_sizes[index : index + 1]
            own = jnp.roll(rows, -starts[index], axis=0)
            gate, up, down = (w[None] for w in weights)
            product = grouped_swiglu(own, gate, up, down, size)
            out = out + jnp.roll(product, starts[index], axis=0)
        return out

    def batched(self, rows: Float[Array, "e c d"]) -> Float[Array, "e c d"]:
        """c rows for each module."""
        return jnp.stack([_apply(w, rows[index]) for index, w in enumerate(self.modules)])

    def gathered(
        self, rows: Float[Array, "n k d"], experts: Int[Array, "n k"]
    ) -> Float[Array, "n k d"]:
        """Every module on every slot, each slot keeping its own: for a few rows."""
        outputs = jnp.stack([_apply(weights, rows) for weights in self.modules])
        return jnp.take_along_axis(outputs, experts[None, ..., None], axis=0)[0]

    def executed(self, group_sizes: Int[Array, "e"], rows: int) -> Int[Array, ""]:
        """Rows that `grouped` multiplies, of all modules together."""
        return jnp.sum(self.executed_each(group_sizes, rows), dtype=jnp.int32)

    def executed_each(self, group_sizes: Int[Array, "e"], rows: int) -> Int[Array, "e"]:
        """Rows that `grouped` multiplies with each module."""
        none = jnp.int32(0)
        return jnp.stack(
            [none if w is None else executed_rows(group_sizes[i : i + 1], rows)
             for i, w in enumerate(self.modules)]
        )  # fmt: skip


def _apply(weights: Weights, x: Array) -> Array:
    if weights is None:
        return jnp.zeros_like(x)
    gate, up, down = weights
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class Ladder(nn.Module):
    """One module per token out of several widths (Duo-LLM, arXiv 2410.10846: big, small, and perhaps none).

    Events: ``router/rows``, and ``width_F/rows`` for each module of width F. Plans (captured): ``route``, ``load``.
    All modules read the same normed input (the paper does not say; the block's own norm).

    Attributes:
      router: factory, called with ``num_experts`` = number of widths. Plans may mix modules (soft training).
      widths: f of each module, distinct; 0 is no module at all (the token skips the FFN).
      dispatch: "dropless" (each module on its own rows) or "mask" (all on all).
    """

    router: Factory
    widths: Sequence[int]
    dispatch: Literal["dropless", "mask"] = "dropless"
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Applies the chosen module at every position; padding uses none."""
        self._check()
        b, t, d = x.shape
        rows = x.reshape(b * t, d)
        row_mask = None if mask is None else mask.reshape(b * t)
        router = self.router(name="router", num_experts=len(self.widths), dtypes=self.dtypes)
        plan, losses = router(rows, row_mask, train)
        y, executed = self._run(plan, rows, self._bank(d))
        load = plan.load(len(self.widths))
        seen = b * t if row_mask is None else jnp.sum(row_mask.astype(bool), dtype=jnp.int32)
        events: dict[str, Any] = {"router": {"rows": count(seen, b * t)}}
        for index, width in enumerate(self.widths):
            events[f"width_{width}"] = {"rows": count(load[index], executed[index])}
        plans = {"route": plan, "load": load} if "plan" in capture else {}
        return y.reshape(b, t, d), Aux(losses, events, plans)

    def _check(self) -> None:
        check_factory(self.router, "Ladder.router")
        widths = list(self.widths)
        if len(widths) < 2 or min(widths) < 0 or len(set(widths)) != len(widths):
            raise DyncompError(
                f"Ladder.widths={widths}: use two or more distinct widths, 0 for none"
            )
        if self.dispatch not in ("dropless", "mask"):
            raise DyncompError(f"Ladder.dispatch={self.dispatch!r}: use 'dropless' or 'mask'")

    def _bank(self, d: int) -> LadderBank:
        def module(f: int) -> Weights:
            shapes = {"gate": (d, f), "up": (d, f), "down": (f, d)}
            axes = {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
            make = lambda n: param(self, f"{n}_{f}", INIT, shapes[n], axes[n], self.dtypes.param)
            return make("gate"), make("up"), make("down")

        return LadderBank(tuple(module(f) if f else None for f in self.widths))

    def _run(self, plan: RoutePlan, rows: Array, bank: LadderBank) -> tuple[Array, Array]:
        """Output, and rows executed by each module."""

        def run(plan: RoutePlan, rows: Array, bank: LadderBank) -> tuple[Array, Array]:
            e = len(self.widths)
            y, _ = getattr(dispatch, self.dispatch)(plan, rows, bank, e)
            if self.dispatch == "mask":
                each = [rows.shape[0] if f else 0 for f in self.widths]
                return y, jnp.asarray(each, jnp.int32)
            return y, bank.executed_each(plan.load(e), plan.experts.size)

        y, each = on_own_rows(run, plan, rows, bank)
        return y, each

    def cost(self, d_model: int) -> dict[str, dict[str, Cost]]:
        """Prices of scoring a row and of one row through each module."""
        router = self.router(parent=None, num_experts=len(self.widths), dtypes=self.dtypes)
        widths = {
            f"width_{f}": {
                "rows": Cost(6 * d_model * f, moved(d_model, f, self.dtypes) if f else 0)
            }
            for f in self.widths
        }
        return {"router": router.cost(d_model), **widths}
