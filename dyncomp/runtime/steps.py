"""A network that repeats one step until it is sure, as segments: the first time, and a loop."""

from typing import Any

import jax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Variables
from dyncomp.runtime.segments import END, Segment, Segmented

FIRST, AGAIN = "first", "again"


def from_steps(model: Any, variables: Variables, inputs_shape: tuple[int, ...]) -> Segmented:
    """Two segments, ``first`` and ``again``; an example's steps are its visits of both.

    Args:
      model: a module with ``folded()``, the weights that it runs with; pure functions ``begin(weights, inputs)`` and
        ``step(weights, carry, threshold) -> (carry, output, leave, score)``; ``max_steps``; a control ``threshold``;
        and ``cost`` with prices ``first`` (what is done once) and ``step``.
      variables: boxed or not.
      inputs_shape: [b ...] (b is not looked at), for the costs.
    """
    from flax import linen as nn

    if model.max_steps < 1:
        raise DyncompError(f"max_steps={model.max_steps}: a network runs one step or more")
    variables = nn.meta.unbox(variables)
    weights = jax.jit(lambda variables: model.apply(variables, method="folded"))(variables)
    price, once = model.cost(inputs_shape), model.max_steps == 1
    targets = (END,) if once else (AGAIN, END)
    first = Segment(model.step, weights, price["first"] + price["step"], FIRST, targets)
    again = Segment(
        model.step, weights, price["step"], AGAIN, (AGAIN, END), max_trips=model.max_steps - 1
    )
    threshold = float(variables["controls"]["threshold"])
    parts = [first] if once else [first, again]
    return Segmented(model.begin, weights, parts, [threshold] * len(parts))
