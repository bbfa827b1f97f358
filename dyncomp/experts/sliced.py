"""A dense feed-forward network cut into slices of its hidden neurons, of which each token runs a few.

FactorLLM (arXiv 2408.11855): y = (N / K) * sum of the K chosen slices, unweighted. How a dense checkpoint is cut stands
in `dyncomp.experts.convert`; the router that learns which slices matter in `dyncomp.routers.distilled`.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core import dispatch
from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.experts.bank import SwiGLUBank
from dyncomp.experts.ffn import SwiGLU
from dyncomp.experts.local import on_own_rows
from dyncomp.routers.imitation import Outputs

Dispatch = Literal["dropless", "mask", "gather"]


class SlicedFFN(nn.Module):
    """Runs the slices that a router chooses and adds them up, scaled by N over their number.

    Only the router's choice counts, not its gates, so the loss of the task gives a router no gradient.

    A router that learns from the outputs of all slices (it has ``reads_outputs(train)``) is handed them. That costs a
    whole dense network (twice that with a teacher of its own), while training; evaluation runs the chosen slices alone.
    Parameters: ``gate``, ``up`` [N d f/N], ``down`` [N f/N d], ``router/...`` and, for such a router,
    ``teacher/...``, the dense network as it was: keep it out of `Stage.trainable`.

    Events: ``router/rows``, ``experts/rows`` and, where all slices ran, ``outputs/rows``; a bound that looks at the
    outputs in evaluation executes these rows but needs none. Losses: the router's and, where all slices ran,
    ``reconstruction``: squared error of y relative to the target's square. Plans: ``route``, ``load``.

    Attributes:
      router: factory, called with ``num_experts``.
      num_slices: N.
      hidden: f of the dense network; N divides it.
      rescale: the factor N / K; without it y is the plain sum.
      teacher: where the target comes from: a "frozen" copy of the dense network, or the sum of the "slices" as they
        are (no copy; it moves when they do).
      states: what layers above see while training: this unit's output ("student") or the target ("teacher"). Under
        "teacher" every router sees the dense model's states, and nothing but routers can learn.
      dispatch: "dropless", "mask" (all slices on all rows) or "gather" (few rows).
    """

    router: Factory
    num_slices: int
    hidden: int
    rescale: bool = True
    teacher: Literal["frozen", "slices"] = "frozen"
    states: Literal["student", "teacher"] = "student"
    dispatch: Dispatch = "dropless"
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Applies the unit to every position; padding uses no slice."""
        self._check()
        b, t, d = x.shape
        rows, row_mask = x.reshape(b * t, d), None if mask is None else mask.reshape(b * t)
        sizes = (self.num_slices, d, self.hidden // self.num_slices, self.dtypes.param)
        bank = jax.tree.map(lambda w: w.astype(x.dtype), SwiGLUBank.create(self, *sizes))
        outputs = self._outputs(x, bank, train)
        plan, losses = self._route(rows, row_mask, train, outputs)
        y, executed = self._run(plan, rows, bank)
        seen = b * t if row_mask is None else jnp.sum(row_mask.astype(bool), dtype=jnp.int32)
        events = {
            "router": {"rows": count(seen, b * t)},
            "experts": {"rows": count(jnp.sum(plan.keep, dtype=jnp.int32), executed)},
        }
        if outputs is not None:
            losses = {**losses, "reconstruction": reconstruction(y, outputs.target, row_mask)}
            events["outputs"] = {"rows": count(seen if train else 0, b * t)}
            if train and self.states == "teacher":
                y = outputs.target
        plans = {"route": plan, "load": plan.load(self.num_slices)} if "plan" in capture else {}
        return y.reshape(b, t, d), Aux(losses, events, plans)

    def _check(self) -> None:
        check_factory(self.router, "SlicedFFN.router")
        if self.num_slices < 1 or self.hidden < 1 or self.hidden % self.num_slices:
            raise DyncompError(
                f"SlicedFFN: num_slices={self.num_slices} must divide hidden={self.hidden}"
            )
        for name, known in (
            ("teacher", ("frozen", "slices")),
            ("states", ("student", "teacher")),
            ("dispatch", ("dropless", "mask", "gather")),
        ):
            if getattr(self, name) not in known:
                raise DyncompError(
                    f"SlicedFFN.{name}={getattr(self, name)!r}: use one of {', '.join(known)}"
                )

    def _router(self, **kwargs: Any) -> Any:
        return self.router(num_experts=self.num_slices, dtypes=self.dtypes, **kwargs)

    def _reads(self, train: bool) -> bool | None:
        """Whether the router wants all outputs now; None for one that never does."""
        reads = getattr(self._router(parent=None), "reads_outputs", None)
        return None if reads is None else reads(train)

    def _outputs(self, x: Array, bank: SwiGLUBank, train: bool) -> Outputs | None:
        """All slices and their target, without gradient."""
        reads, init = self._reads(train), self.is_initializing()
        has_teacher = self.teacher == "frozen" and reads is not None
        wanted = bool(reads) or (train and self.states == "teacher") or (init and reads is not None)
        if not wanted:
            return None
        rows = jax.lax.stop_gradient(x.reshape(-1, x.shape[-1]))
        bank = jax.tree.map(jax.lax.stop_gradient, bank)
        slices = bank.batched(jnp.broadcast_to(rows, (self.num_slices, *rows.shape)))
        if has_teacher:
            dense = SwiGLU(self.hidden, self.dtypes, name="teacher")
            target = dense(jax.lax.stop_gradient(x))[0].reshape(rows.shape)
        else:
            target = jnp.sum(slices, axis=0)
        return jax.tree.map(jax.lax.stop_gradient, Outputs(slices, target))

    def _route(self, rows, mask, train, outputs) -> tuple[RoutePlan, dict[str, Array]]:
        """The router's choice with weights N / count (or 1), and its losses."""
        handed = {} if self._reads(train) is None else {"outputs": outputs}
        plan, losses = self._router(name="router")(rows, mask, train, **handed)
        used = jnp.maximum(plan.counts(), 1).astype(jnp.float32)[:, None]
        scale = self.num_slices / used if self.rescale else jnp.ones_like(used)
        weights = jnp.where(plan.keep, scale, 0.0)
        return dataclasses.replace(plan, weights=weights, priority=None), losses

    def _run(self, plan: RoutePlan, rows: Array, bank: SwiGLUBank) -> tuple[Array, Array]:
        """Output and executed rows."""

        def run(plan: RoutePlan, rows: Array, bank: SwiGLUBank) -> tuple[Array, Array]:
            y, stats = getattr(dispatch, self.dispatch)(plan, rows, bank, self.num_slices)
            return y, stats.executed

        y, executed = on_own_rows(run, plan, rows, bank)
        return y, executed

    def cost(self, d_model: int) -> dict[str, dict[str, Cost]]:
        """Prices of scoring a row, of a row through one slice and, for a router that learns, through everything."""
        own = self.hidden // self.num_slices
        table = {
            "router": self._router(parent=None).cost(d_model),
            "experts": {"rows": SwiGLUBank.cost(d_model, own, self.dtypes)},
        }
        reads = self._reads(True)
        if reads is not None or self.states == "teacher":
            dense = SwiGLUBank.cost(d_model, self.hidden, self.dtypes)
            copies = 2 if reads is not None and self.teacher == "frozen" else 1
            table["outputs"] = {"rows": copies * dense}
        return table


def reconstruction(
    y: Float[Array, "n d"], target: Float[Array, "n d"], mask: Float[Array, "n"] | None = None
) -> Float[Array, ""]:
    """sum |y - t|^2 / sum |t|^2 over real rows, float32."""
    y, target = y.astype(jnp.float32), target.astype(jnp.float32)
    weight = jnp.float32(1) if mask is None else mask.astype(jnp.float32)[:, None]
    error, whole = (jnp.sum(weight * jnp.square(v)) for v in (y - target, target))
    return error / jnp.maximum(whole, 1e-20)
