"""An encoder-decoder with exits in its streams and in its decoder's steps, as segments."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Variables
from dyncomp.models import layout
from dyncomp.models.saturating import SaturatingVLM
from dyncomp.runtime.segments import END, Segment, Segmented

BLOCKS = {"reader": "layers_", "writer": "layers_"}


def from_saturating(model: SaturatingVLM, variables: Variables) -> Segmented:
    """Greedy writing as segments; the output is the logits [b t v] of the words written, zeros for the rest.

    ``image_i``, ``text_i`` (``joint_i``): a layer of a stream, then the next or the next stream. ``memory``: the norm
    over what they left. ``keys_i``: the memory's keys and values for a decoder layer, only where it first runs;
    ``layer_i``: the layer for one word. ``head``: the word, then the first layer again or the end. A row's words are
    written at its own speed, so rows of one launch may be at different words.

    Args:
      model: with ``layers="unroll"``.
      variables: stacked or not, boxed or not.
    """
    if model.layers != "unroll":
        raise DyncompError("segments need separate weights; set the network's layers='unroll'")
    params = layout.unstack(nn.meta.unbox(variables)["params"])
    controls = jax.device_get(variables["controls"])
    build = _Build(model, params)
    net = model.template()
    parts, thresholds = [], []
    follow = [*(f"{name}_0" for name in model.streams), "memory"]
    for name, after in zip(model.streams, follow[1:], strict=True):
        for index in range(net.encoder_depth):
            last = index == net.encoder_depth - 1
            targets = (after,) if last else (f"{name}_{index + 1}", after)
            parts.append(build.stream(name, index, targets))
            thresholds.append(float(controls[name]))
    parts.append(build.memory())
    thresholds.append(0.0)
    for index in range(net.decoder_depth):
        parts += [build.keys(index), build.layer(index)]
        thresholds += [0.0, float(controls["decoder"])]
    parts.append(build.head())
    thresholds.append(0.0)
    begin = lambda weights, inputs: model.apply({"params": weights}, inputs, method="begin")
    return Segmented(begin, build.weights(), parts, thresholds)


class _Build:
    """Makes the segments of one model; prices charge full lengths, padding included."""

    def __init__(self, model: SaturatingVLM, params: Mapping[str, Any]):
        self.model, self.params, self.net = model, params, model.template()
        self.price = model.cost(())

    def weights(self, stack: str = "", index: int = -1) -> Any:
        """Parameters without blocks but one."""
        inner = {name: value for name, value in self.params["inner"].items() if name not in BLOCKS}
        if stack:
            name = f"{BLOCKS[stack]}{index}"
            inner[stack] = {name: self.params["inner"][stack][name]}
        return {**self.params, "inner": inner}

    def call(self, method: str, *args: Any) -> Callable:
        """A method of the model as ``(weights, carry, *rest)``."""

        def run(weights: Any, carry: Any, *rest: Any) -> Any:
            return self.model.apply({"params": weights}, *args, carry, *rest, method=method)

        return run

    def stream(self, name: str, index: int, targets: tuple[str, ...]) -> Segment:
        """A layer of the encoder."""
        layer, own, row = self.call("stream_layer", name, index), self.price[name], self.net.row
        tokens = {"image": self.net.patch_tokens, "text": row.text}
        n = tokens.get(name, sum(tokens.values()))
        cost = own["tokens"] * n + own["pairs"] * (n * n)
        cost = cost + (own["rule"] * n if len(targets) > 1 else Cost(0))
        first = name == self.model.streams[0] and index == 0
        cost = cost + (self.price["embed"]["images"] if first else Cost(0))

        def run(weights: Any, carry: Any, threshold: Any) -> Any:
            carry, leave, score = layer(weights, carry, threshold)
            return carry, carry["logits"], leave, score

        return Segment(run, self.weights("reader", index), cost, f"{name}_{index}", targets)

    def memory(self) -> Segment:
        """The encoder's norm."""
        remember = self.call("remember")

        def run(weights: Any, carry: Any, threshold: Any) -> Any:
            return _no_choice(remember(weights, carry))

        return Segment(run, self.weights(), name="memory", targets=("keys_0",))

    def keys(self, index: int) -> Segment:
        """Keys and values of the memory for one layer."""
        make, slots = self.call("keys", index), self.net.patch_tokens + self.net.row.text

        def run(weights: Any, carry: Any, threshold: Any) -> Any:
            return _no_choice(make(weights, carry))

        cost = self.price["decoder"]["memory"] * slots
        weights = self.weights("writer", index)
        return Segment(run, weights, cost, f"keys_{index}", (f"layer_{index}",))

    def layer(self, index: int) -> Segment:
        """A layer of the decoder; then the next, its keys first where they are missing, or the head."""
        layer, last = self.call("layer", index), index == self.net.decoder_depth - 1
        following = (f"layer_{index + 1}", f"keys_{index + 1}")
        fills = self.model.self_fill == "recompute" and not last

        def run(weights: Any, carry: Any, threshold: Any) -> Any:
            carry, leave, score = layer(weights, carry, threshold)
            if last:
                return carry, carry["logits"], leave, score
            missing = ~carry["known"][:, index + 1]
            route = jnp.where(leave, 2, missing.astype(jnp.int32))
            return carry, carry["logits"], route, score

        own, t = self.price["decoder"], self.net.row.answer
        slots = self.net.patch_tokens + self.net.row.text
        cost = own["words"] + own["pairs"] * t + own["memory_pairs"] * slots
        cost = cost + (Cost(0) if last else own["rule"])
        # Filling a cache above takes its layer's projections, which are weights of this segment, too.
        weights = self.weights("writer", index)
        if fills:
            weights = {**self.params, "inner": {**weights["inner"], "writer": self._from(index)}}
        targets = ("head",) if last else (*following, "head")
        return Segment(run, weights, cost, f"layer_{index}", targets)

    def _from(self, index: int) -> Any:
        layers = self.params["inner"]["writer"]
        return {name: own for name, own in layers.items() if int(name.split("_")[1]) >= index}

    def head(self) -> Segment:
        """The word that is written."""
        finish = self.call("finish")

        def run(weights: Any, carry: Any, threshold: Any) -> Any:
            step = carry["step"]
            carry, ended = finish(weights, carry)
            logits = carry["logits"]
            said = jnp.take_along_axis(logits, step[:, None, None], axis=1)[:, 0]
            return carry, logits, ended, jnp.max(said, axis=-1)

        words = self.net.row.answer
        cost, weights = self.price["head"]["words"], self.weights()
        if words == 1:
            return Segment(run, weights, cost, "head", (END,))
        return Segment(run, weights, cost, "head", ("layer_0", END), max_trips=words)


def _no_choice(carry: Any) -> tuple[Any, Any, Any, Any]:
    """One way on; no score."""
    rows = carry["step"].shape
    return carry, carry["logits"], jnp.ones(rows, bool), jnp.full(rows, jnp.nan, jnp.float32)
