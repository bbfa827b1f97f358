"""A network as segments with a decision after each: what the executors run.

A model with exits gives this description for free (`from_model`); any other network can be written down by hand: a
decision may leave, skip segments, choose one of several, or go back (DyCL's host module, arXiv 2307.04963, as data).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Variables

Carry = Any
"""What is kept of each example between segments: a pytree whose leaves have a leading batch axis."""


FREE = Cost(0)

END = "end"
"""The target that means: leave, with this segment's output."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a network that ends in a decision.

    Attributes:
      run: ``(weights, carry, threshold) -> (carry, output, route, score)``. ``route`` [b] is bool or int: which of
        ``targets`` follows. ``score`` float [b] is what decided (NaN decides nothing and is reported). ``output`` is
        kept of examples that leave; of one shape in all segments. Must treat examples independently.
      weights: pytree of just what this segment uses.
      cost: price of one example.
      name: unique; default ``segment_i``.
      targets: names of segments, or `END`. Default: the next one, or `END` where ``route`` is true; after the last
        segment `END` alone.
      max_trips: for a segment that may lead back: how often one example runs it at most; the last time it goes to
        the last target, whatever ``route`` says.
    """

    run: Callable[[Any, Carry, Any], tuple[Carry, Any, Any, Any]]
    weights: Any
    cost: Cost = FREE
    name: str = ""
    targets: tuple[str, ...] = ()
    max_trips: int = 0


@dataclasses.dataclass(frozen=True)
class Segmented:
    """The whole network.

    Attributes:
      begin: ``(weights, inputs) -> carry``; runs together with the first segment.
      begin_weights: what it uses.
      segments: in order; the first one runs first, and a target earlier in the list is a loop.
      thresholds: one a segment, run-time values (a segment that decides nothing does not look at its own).
    """

    begin: Callable[[Any, Any], Carry]
    begin_weights: Any
    segments: Sequence[Segment]
    thresholds: Any

    def __post_init__(self):
        _check_count(len(self.thresholds), len(self.segments))


def full_thresholds(thresholds: Any, segments: int) -> np.ndarray:
    """float32 [s], 0 for a last one that is left out.

    Raises:
      DyncompError: not one for each segment (the last may be left out).
    """
    given = np.asarray(thresholds, np.float32)
    _check_count(len(given) if given.ndim == 1 else f"an array {given.shape} of", segments)
    return np.append(given, np.zeros(segments - len(given), np.float32))


def _check_count(count: int | str, segments: int) -> None:
    if not segments or count not in (segments, segments - 1):
        raise DyncompError(
            f"{segments} segments with {count} thresholds: "
            "give one threshold to each segment (the last may be left out)"
        )


def from_model(model: Any, variables: Variables, inputs_shape: tuple[int, ...]) -> Segmented:
    """Segments of a model that describes itself so (`ExitingClassifier`, `SkippingClassifier`, `StagedClassifier`).

    Args:
      model: a module with the methods ``begin(inputs) -> carry`` and ``segment(index, carry, threshold)``, which gives
        what `Segment.run` does; ``cost(inputs_shape)``, the price of each segment in order; ``weights_of(params,
        index)``, the parameters that segment ``index`` (None: ``begin``) uses; the control ``thresholds``, one a
        segment (the last may be left out); and, where it does more than leave, ``targets(index)``, names of what may
        follow (``segment_i``, `END`). One with ``layers`` wants ``layers="unroll"``. One whose segments read controls
        besides the threshold (running statistics) has ``controls_of(controls, index)``.
      variables: stacked or not, boxed or not.
      inputs_shape: [b h w c] (b is not looked at), for the costs.

    Raises:
      DyncompError: the layers are scanned, so that segments would share one array of weights.
    """
    from flax import linen as nn

    from dyncomp.models import layout

    if getattr(model, "layers", "unroll") != "unroll":
        raise DyncompError("segments need separate weights; set the backbone's layers='unroll'")
    tree = layout.unstack(nn.meta.unbox(variables))
    read = getattr(model, "controls_of", lambda controls, index: {})
    prices = list(model.cost(inputs_shape).values())
    targets = getattr(model, "targets", lambda index: ())

    def begin(weights: Any, inputs: Any) -> Carry:
        return model.apply(weights, inputs, method="begin")

    def make(index: int) -> Callable:
        def run(weights: Any, carry: Carry, threshold: Any):
            return model.apply(weights, index, carry, threshold, method="segment")

        return run

    def held(index: int | None) -> dict[str, Any]:
        params = model.weights_of(tree["params"], index)
        return {"params": params, "controls": read(tree["controls"], index)}

    parts = [
        Segment(make(i), held(i), price, f"segment_{i}", tuple(targets(i)))
        for i, price in enumerate(prices)
    ]
    thresholds = list(jax.device_get(variables["controls"]["thresholds"]))
    return Segmented(begin, held(None), parts, thresholds)


def whole(model: Any, variables: Variables, cost: Cost = FREE) -> Segmented:
    """A network that decides nothing about whole examples, as one segment: they all leave after it.

    What it decides inside (experts, blocks of keys, tokens) stays there. It must treat examples independently: experts
    with a capacity that a batch shares do not.

    Args:
      model: a module that is called with inputs and gives ``(output, aux)``; of one that gives several logits, those
        that it emits.
      variables: as the model takes them.
      cost: price of one example.
    """
    import jax.numpy as jnp

    from dyncomp.models import layout
    from dyncomp.tasks.objectives import answer_of

    def run(weights: Any, carry: Carry, threshold: Any) -> Any:
        output = answer_of(layout.apply(model, weights, carry)[0])
        b = output.shape[0]
        return carry, output, jnp.ones((b,), bool), jnp.full((b,), jnp.nan, jnp.float32)

    return Segmented(
        lambda _, inputs: inputs, None, [Segment(run, variables, cost, "network")], [0.0]
    )
