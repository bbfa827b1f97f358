"""How often events happen in one forward pass, read from the traced program without running the model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval

from dyncomp.core.aux import flatten
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import PyTree
from dyncomp.models.layout import apply


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Counts of one training forward pass, by event path.

    Attributes:
      executed: the most that may be executed: exact where a count does not depend on values; rows of experts are
        bounded by the slots of their plans, block padding not included. None where neither helps.
      every: rows of experts if every expert ran on every token, where there is a route plan.
    """

    executed: dict[str, int | None]
    every: dict[str, int]


def bounds(model: Any, variables: PyTree, inputs: Any) -> Bounds:
    """What a forward pass may execute, without running it.

    Args:
      model: returns ``(output, Aux)``.
      variables: abstract, unboxed.
      inputs: abstract.
    """
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    slots: dict[str, int] = {}
    every: dict[str, int] = {}
    paths: list[str] = []

    def executed(variables: Any, inputs: Any, keys: Any) -> list[Any]:
        _, aux = apply(model, variables, inputs, train=True, rngs=keys, capture=("plan",))
        plans = flatten(aux.plans)
        slots.update(_plan_slots(plans))
        every.update(_all_rows(plans))
        events = flatten(aux.events)
        paths.extend(events)
        return [count.executed for count in events.values()]

    traced = jax.make_jaxpr(executed)(variables, inputs, {"router": key, "dropout": key})
    out: dict[str, int | None] = {}
    for index, path in enumerate(paths):
        fixed = _constant(traced, index)
        bound = next((size for prefix, size in slots.items() if path.startswith(prefix)), None)
        out[path] = bound if fixed is None else fixed
    return Bounds(out, {path: rows for path, rows in every.items() if path in out})


def rows_of_every_expert(model: Any, variables: PyTree, inputs: Any) -> dict[str, int]:
    """`Bounds.every`, without the other counts."""
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    found: dict[str, int] = {}

    def forward(variables: Any, inputs: Any, keys: Any) -> None:
        _, aux = apply(model, variables, inputs, train=True, rngs=keys, capture=("plan",))
        found.update(_all_rows(flatten(aux.plans)))

    jax.eval_shape(forward, variables, inputs, {"router": key, "dropout": key})
    return found


def executed_at_most(model: Any, variables: PyTree, inputs: Any) -> dict[str, int | None]:
    """`Bounds.executed`."""
    return bounds(model, variables, inputs).executed


def _plan_slots(plans: Mapping[str, Any]) -> dict[str, int]:
    """``prefix/experts`` -> slots of the route plan captured under ``prefix``, all layers together."""
    routes = {path: plan for path, plan in plans.items() if isinstance(plan, RoutePlan)}
    return {
        path.rpartition("/")[0] + "/experts": plan.experts.size for path, plan in routes.items()
    }


def _all_rows(plans: Mapping[str, Any]) -> dict[str, int]:
    """``prefix/experts/rows`` -> tokens times experts with a network, all layers together."""
    found = {}
    for path, plan in plans.items():
        prefix = path.rpartition("/")[0]
        load, free = plans.get(f"{prefix}/load"), plans.get(f"{prefix}/free")
        if isinstance(plan, RoutePlan) and load is not None:
            networks = load.shape[-1] - (0 if free is None else free.shape[-1])
            tokens = plan.experts.size // plan.experts.shape[-1]
            found[f"{prefix}/experts/rows"] = tokens * networks
    return found


def _constant(traced: Any, output: int) -> int | None:
    """Sum of one output of a traced function if it depends on no argument."""
    wanted = [index == output for index in range(len(traced.jaxpr.outvars))]
    small, used = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
    if any(used):
        return None
    (value,) = jaxpr_as_fun(traced.replace(jaxpr=small))()
    return int(np.asarray(value).astype(np.int64).sum())
