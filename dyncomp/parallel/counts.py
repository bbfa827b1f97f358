"""How often events happen in one forward pass, read from the traced program without running the model."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval

from dyncomp.core.aux import Count, flatten
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
    keys = {
        name: jax.ShapeDtypeStruct((), jax.random.key(0).dtype) for name in ("router", "dropout")
    }

    def forward(variables: Any, inputs: Any, keys: Any, capture: tuple[str, ...]) -> Any:
        _, aux = apply(model, variables, inputs, train=True, rngs=keys, capture=capture)
        return aux

    aux = jax.eval_shape(lambda *args: forward(*args, ("plan",)), variables, inputs, keys)
    traced = jax.make_jaxpr(lambda *args: forward(*args, ()).events)(variables, inputs, keys)
    events = flatten(aux.events)
    slots = _plan_slots(aux.plans)
    places = {
        path: next((size for prefix, size in slots.items() if path.startswith(prefix)), None)
        for path in events
    }
    out = {}
    for index, path in enumerate(events_order(events, aux.events)):
        fixed = _constant(traced, 2 * index + 1)
        out[path] = places[path] if fixed is None else fixed
    return out


def events_order(events: Mapping[str, Any], tree: Any) -> list[str]:
    """Paths in the order in which jax flattens the tree (needed, executed of each)."""
    is_count = lambda node: isinstance(node, Count)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_count)
    paths = ["/".join(str(key.key) for key in path) for path, _ in flat]
    assert sorted(paths) == sorted(events)
    return paths


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
