"""Greedy decoding with an exit for every token, as segments: a loop until each sequence is done."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float, Variables
from dyncomp.depth import CONTINUE, EXIT, STOP, decision, exit_logits, max_probability
from dyncomp.models import DecoderLM, NestedLM, StoppingLM, layout
from dyncomp.models.exiting import block_prices, only_block
from dyncomp.runtime.segments import END, Carry, Segment, Segmented


def greedy(model: Any, variables: Variables, prompt: int, new: int) -> Segmented:
    """A `NestedLM` or `StoppingLM` decoding greedily: prompts int32 [b prompt] to tokens int32 [b new].

    Every token runs blocks up to the exit that decides, so depth differs from sequence to sequence and from token to
    token; then its sequence goes back to the first block, one token longer. There is no cache: a token reads its whole
    sequence again, so it leaves exactly where the model's own pass has it leave at the last position. A `StoppingLM`
    that says "stop" ends its completion; tokens that were not emitted are -1.

    Segments: ``begin``; ``exit_k``, the blocks between two exits and a decision; ``emit``, which goes back.
    Thresholds are those of the controls: a `StoppingLM` has its ``tau_exit`` at every exit, and its ``tau_stop`` is
    fixed when this is called.

    Args:
      model: of dense blocks.
      variables: stacked or not.
      prompt: tokens of every prompt, at least 1.
      new: tokens to decode, at least 1.
    """
    if prompt < 1 or new < 1:
        raise DyncompError(f"greedy: prompt={prompt}, new={new}: use 1 or more")
    parts = _Exits(model, nn.meta.unbox(variables), prompt, new)
    count = len(parts.depths)
    segments = [Segment(_pass_on, None, name="begin", targets=("exit_0",))]
    for index in range(count):
        deeper = (f"exit_{index + 1}",) if index + 1 < count else ()
        run, own, price = parts.segment(index), parts.weights_of(index), parts.price(index)
        segments.append(Segment(run, own, price, f"exit_{index}", (*deeper, "emit")))
    loops = (("exit_0", END), new) if new > 1 else ((END,), 0)
    segments.append(Segment(parts.emit, None, Cost(0), "emit", *loops))
    return Segmented(parts.begin, None, segments, [0.0, *parts.thresholds(), 0.0])


def _pass_on(weights: Any, carry: Carry, threshold: Any) -> Any:
    b = carry["count"].shape[0]
    return carry, carry["emitted"], jnp.zeros((b,), bool), jnp.full((b,), jnp.nan, jnp.float32)


class _Exits:
    """The segments of a model with exits at ``depths``."""

    def __init__(self, model: Any, variables: Variables, prompt: int, new: int):
        self.stopping = isinstance(model, StoppingLM)
        self.per_exit = self.stopping and model.per_exit
        self.nested: NestedLM = model.nested(parent=None) if self.stopping else model
        self.net: DecoderLM = self.nested.template().clone(layers="unroll", parent=None)
        self.depths, self.prompt, self.new = self.nested.depths, prompt, new
        self.params = layout.unstack(variables["params"])
        self.controls = jax.device_get(variables["controls"])

    def thresholds(self) -> list[float]:
        """One an exit."""
        if self.stopping:
            return [float(self.controls["tau_exit"])] * len(self.depths)
        return [*map(float, self.controls["thresholds"]), 0.0]

    def span(self, index: int) -> range:
        """Blocks of exit ``index``."""
        return range(self.depths[index - 1] if index else 0, self.depths[index])

    def weights_of(self, index: int) -> dict[str, Any]:
        """What exit ``index`` uses: its blocks, the norm, the head, what is its own."""
        own = {n: v for n, v in self.params.items() if not n.startswith("group_")}
        heads = own.pop("exit_heads", None)
        if heads is not None and index < len(heads):
            own["exit_heads"] = heads[index]
        if self.per_exit:
            own["controller"] = own["controller"][index]
        for block in self.span(index):
            for name, layers in only_block(self.params, block).items():
                if name.startswith("group_"):
                    group = own.setdefault(name, {})
                    for layer, blocks in layers.items():
                        group[layer] = {**group.get(layer, {}), **blocks}
        return own

    def price(self, index: int) -> Cost:
        """The blocks on the whole sequence, the head and the controller on one position."""
        length, table = self.prompt + self.new - 1, self.net.cost((1, self.prompt + self.new - 1))
        blocks = block_prices(table, self.net, length, pairs=length * (length + 1) // 2)
        own = sum((blocks[n] for n in self.span(index)), table["head"]["tokens"])
        return own + Cost(2 * 3 * self.net.d_model if self.stopping else 0)

    def begin(self, weights: Any, tokens: Any) -> Carry:
        """The sequence with room for what will be said."""
        b, room = tokens.shape[0], self.prompt + self.new - 1
        if tokens.shape[1] != self.prompt:
            raise DyncompError(
                f"prompts of {tokens.shape[1]} tokens; greedy got prompt={self.prompt}"
            )
        whole = jnp.zeros((b, room), jnp.int32).at[:, : self.prompt].set(tokens)
        return {
            "tokens": whole,
            "count": jnp.full((b,), self.prompt, jnp.int32),
            "x": jnp.zeros((b, room, self.net.d_model), self.net.dtypes.compute),
            "token": jnp.full((b,), -1, jnp.int32),
            "emitted": jnp.full((b, self.new), -1, jnp.int32),
        }

    def segment(self, index: int) -> Callable[..., Any]:
        """Blocks up to exit ``index``, and what it says."""

        def run(params: Any, carry: Carry, threshold: Any) -> Any:
            own = {n: v for n, v in params.items() if n not in ("exit_heads", "controller")}
            call = lambda method, *args: self.net.apply({"params": own}, *args, method=method)
            x: Any = carry["x"] if index else call("embed", carry["tokens"], self._places())
            for block in self.span(index):
                x = call("run_block", block, x)[0]
            here = jnp.take_along_axis(x, carry["count"][:, None, None] - 1, axis=1)
            logits = self._logits(call, params, index, here)
            leave, stop, score = self._decide(params, here, logits, threshold)
            token = jnp.where(stop, -1, jnp.argmax(logits, axis=-1)).astype(jnp.int32)
            return {**carry, "x": x, "token": token}, carry["emitted"], leave, score

        return run

    def emit(self, weights: Any, carry: Carry, threshold: Any) -> Any:
        """Appends the token, unless it means stop; the score, how many may follow less a half, is never near 0."""
        count, token = carry["count"], carry["token"]
        room = jnp.arange(carry["tokens"].shape[1])[None] == count[:, None]
        slot = jnp.arange(self.new)[None] == (count - self.prompt)[:, None]
        emitted = jnp.where(slot, token[:, None], carry["emitted"])
        tokens = jnp.where(room & (token >= 0)[:, None], token[:, None], carry["tokens"])
        left = jnp.where(token < 0, 0, self.prompt + self.new - 1 - count)
        carry = {**carry, "tokens": tokens, "count": count + 1, "emitted": emitted}
        return carry, emitted, left == 0, left.astype(jnp.float32) - 0.5

    def _places(self) -> Any:
        length = self.prompt + self.new - 1
        return jnp.arange(length, dtype=jnp.int32)[None]

    def _logits(
        self, call: Any, params: Any, index: int, here: Float[Array, "b 1 d"]
    ) -> Float[Array, "b v"]:
        """What an exit says of the last position, as `NestedLM` has it."""
        if index == len(self.depths) - 1:
            return call("classify", here)[:, 0]
        state = call(lambda net, y: net.final_norm(y), here) if self.nested.norm_early else here
        head = params["embed"].T if self.net.tie_embeddings else params["head"]
        head = head + params["exit_heads"] if "exit_heads" in params else head
        return exit_logits({"states": state[None], "heads": head}, 0)[:, 0]

    def _decide(self, params: Any, here: Array, logits: Array, threshold: Any) -> tuple:
        """(leaves, ends the completion, score)."""
        if not self.stopping:
            score = max_probability(logits)
            return score >= threshold, jnp.zeros(score.shape, bool), score
        weights = params["controller"].astype(here.dtype)
        said = jnp.einsum("btd,dc->bc", here, weights, preferred_element_type=jnp.float32)
        found = decision(said, threshold, jnp.float32(self.controls["tau_stop"]))
        return found != CONTINUE, found == STOP, jax.nn.softmax(said, axis=-1)[:, EXIT]
