"""A block of continuous depth: its output is the solution of a learned differential equation at time 1."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.recurrent.ode import ODESolver
from dyncomp.recurrent.penalties import check_penalties, penalised, penalty_cost
from dyncomp.recurrent.tableau import TABLEAUS


class ODEBlock(nn.Module):
    """z(1) of dz/dt = f(t, z), z(0) = x (Chen et al. 2018; Kidger 2022, ch. 2). Needs the extra ``ode``.

    Parameters: ``field``. Controls: ``tolerance``, a run-time argument that sets each example's number of evaluations.
    Losses [b averaged]: the penalties asked for, integrated over time; zero outside training, where they are not
    computed. Events per example: ``evaluations`` of f and ``attempts`` (the arithmetic of a step), needed by its own
    steps and executed by the batch; ``penalty`` with each evaluation in training.

    Attributes:
      field: factory of f, called with ``dtypes``; ``f(t [b], z [b ...]) -> [b ...]``, deterministic, with
        ``cost(shape) -> Cost``.
      solver: how it is solved.
      tolerance: initial value of the control.
      end: t1.
      augment: zeros added to the last axis of x; the solution keeps them.
      penalties: see `penalised`.
      anneal_from, anneal_steps: training starts with this multiple of the tolerance, which shrinks to 1 geometrically.
    """

    field: Factory
    solver: ODESolver = ODESolver()
    tolerance: float = 1e-3
    end: float = 1.0
    augment: int = 0
    penalties: tuple[str, ...] = ()
    anneal_from: float = 1.0
    anneal_steps: int = 0
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.field, "ODEBlock.field")
        check_penalties(self.penalties)
        self.penalties = tuple(self.penalties)
        if self.tolerance <= 0 or self.end < 0 or self.augment < 0:
            raise DyncompError("ODEBlock: use tolerance > 0, end >= 0 and augment >= 0")
        if self.anneal_from < 1 or (self.anneal_from > 1) != (self.anneal_steps > 0):
            raise DyncompError("ODEBlock: anneal_from > 1 and anneal_steps >= 1 go together")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array | np.ndarray, "b *n d"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b *n o"], Aux]:
        """The solution at the end; its plan (captured) are the `SolveStats`."""
        z = self.widen(x)
        net = self.field(name="field", dtypes=self.dtypes)
        tolerance = self.variable("controls", "tolerance", jnp.float32, self.tolerance).value
        tolerance = tolerance * self._annealed() if train else tolerance
        if self.is_initializing():
            net(jnp.zeros(z.shape[:1], z.dtype), z)
            return z, Aux()
        module, variables = net.unbind()
        field = lambda variables, t, z: module.apply(variables, t, z)
        names = self.penalties if train else ()
        noise = jnp.zeros_like(z)
        if "jacobian" in names:
            noise = jax.random.rademacher(self.make_rng("dropout"), z.shape, z.dtype)
        extras = {name: jnp.zeros(z.shape[:1], z.dtype) for name in names}
        (z, extras), stats = self.solver(
            penalised(field, names), variables, noise, (z, extras), tolerance, 0.0, self.end
        )
        real = jnp.ones(z.shape[:1], bool) if mask is None else mask.astype(bool)
        # An example that ran out of steps has no answer: NaN says so, a state on the way would not.
        stopped = stats.finished.reshape(-1, *[1] * (z.ndim - 1))
        z = jnp.where(stopped, z, jnp.nan)
        return z, Aux(
            losses=self._losses(extras, real),
            events=self._events(stats, real, bool(names)),
            plans={"solve": stats} if "plan" in capture else {},
        )

    def widen(self, x: Float[Array | np.ndarray, "b *n d"]) -> Float[Array, "b *n o"]:
        """z(0): x with zeros appended."""
        zeros = jnp.zeros((*x.shape[:-1], self.augment), x.dtype)
        return jnp.concatenate([x, zeros], axis=-1)

    def _annealed(self) -> Any:
        """How many times the tolerance this training step has."""
        if not self.anneal_steps:
            return jnp.float32(1)
        steps = self.variable("controls", "steps", lambda: jnp.float32(0))
        left = 1.0 - jnp.clip(steps.value / self.anneal_steps, 0.0, 1.0)
        if self.is_mutable_collection("controls") and not self.is_initializing():
            steps.value = steps.value + 1
        return jnp.float32(self.anneal_from) ** left

    def _losses(self, extras: Any, real: Array) -> dict[str, Array]:
        mean = lambda x: jnp.sum(jnp.where(real, x, 0)) / jnp.maximum(jnp.sum(real), 1)
        zero = jnp.float32(0)
        return {
            name: mean(extras[name].astype(jnp.float32)) if name in extras else zero
            for name in self.penalties
        }

    def _events(self, stats: Any, real: Array, penalty: bool) -> dict[str, Any]:
        own = lambda values: jnp.where(real, values, 0)
        runs = count(own(stats.needed), stats.executed)
        steps = count(own(stats.accepted + stats.rejected), stats.attempts)
        return {"evaluations": runs, "attempts": steps, **({"penalty": runs} if penalty else {})}

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the solution for one of x, without batch axis."""
        return (*shape[:-1], shape[-1] + self.augment)

    def cost(self, shape: tuple[int, ...]) -> dict[str, Cost]:
        """Prices for one example of x's shape without its batch axis."""
        shape = self.widened(shape)
        field = self.field(dtypes=self.dtypes, parent=None).cost(shape)
        table = {"evaluations": field, "attempts": attempt_cost(self.solver, math.prod(shape))}
        if self.penalties:
            table["penalty"] = penalty_cost(self.penalties, field, math.prod(shape))
        return table


def attempt_cost(solver: ODESolver, values: int) -> Cost:
    """Arithmetic of an attempted step on a state of so many values, f apart: 2 FLOPs a product, 6 for an error."""
    tableau = TABLEAUS.get(solver.solver)
    terms = 4 if tableau is None else tableau.terms  # reversible Heun combines two slopes twice
    adaptive = 0 if solver.steps else 6
    return Cost((2 * terms + adaptive) * values)
