"""How often events happen in one forward pass, read from the traced program without running the model."""

from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval

from dyncomp.core.aux import flatten
from dyncomp.core.plans import RoutePlan
from dyncomp.core.typing import PyTree
from dyncomp.models.layout import apply


def executed_at_most(model: Any, variables: PyTree, inputs: Any) -> dict[str, int | None]:
    """Upper bounds of the executed counts of one training forward pass, by event path.

    A count that does not depend on values is exact. Rows of experts are bounded by the slots of their plans, block
    padding not included. None where neither helps.

    Args:
      model: returns ``(output, Aux)``.
      variables: abstract, unboxed.
      inputs: abstract.
    """
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    slots: dict[str, int] = {}
    paths: list[str] = []

    def executed(variables: Any, inputs: Any, keys: Any) -> list[Any]:
        _, aux = apply(model, variables, inputs, train=True, rngs=keys, capture=("plan",))
        slots.update(_plan_slots(aux.plans))
        events = flatten(aux.events)
        paths.extend(events)
        return [count.executed for count in events.values()]

    traced = jax.make_jaxpr(executed)(variables, inputs, {"router": key, "dropout": key})
    out: dict[str, int | None] = {}
    for index, path in enumerate(paths):
        fixed = _constant(traced, index)
        bound = next((size for prefix, size in slots.items() if path.startswith(prefix)), None)
        out[path] = bound if fixed is None else fixed
    return out


def _plan_slots(plans: Any) -> dict[str, int]:
    """``prefix/experts`` -> slots of the route plan captured under ``prefix``, all layers together."""
    found = {}
    for path, plan in flatten(plans).items():
        if isinstance(plan, RoutePlan):
            found[path.rpartition("/")[0] + "/experts"] = plan.experts.size
    return found


def _constant(traced: Any, output: int) -> int | None:
    """Sum of one output of a traced function if it depends on no argument."""
    wanted = [index == output for index in range(len(traced.jaxpr.outvars))]
    small, used = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
    if any(used):
        return None
    (value,) = jaxpr_as_fun(traced.replace(jaxpr=small))()
    return int(np.asarray(value).astype(np.int64).sum())
