"""An encoder-decoder that leaves its streams and its decoder's steps where hidden states stop to change (MuE)."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.attention.row_cache import RowSlots, copy_slot
from dyncomp.core.aux import Aux
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.plans import ExitPlan
from dyncomp.core.typing import Array, Bool, Factory, Float, Int, check_factory
from dyncomp.exits.saturation import Decay, SaturationRule, saturated, similarities
from dyncomp.models import saturating_cost as price
from dyncomp.models.encoder_decoder import EncoderDecoder

Carry = dict[str, Any]
"""Of one word of each row, leaves [b ...]: ``step``, ``x``, ``words`` read, ``logits`` and ``depth`` of words written,
``memory`` and ``seen``, ``caches`` (one a layer), ``known`` and ``made`` [b l] (see `SaturatingVLM.keys`)."""


class SaturatingVLM(nn.Module):
    """Three decisions by one rule (arXiv 2211.11152): picture, text, and the decoder at every word.

    Each stream of the encoder stops after the first layer whose output is similar enough to its input; the decoder
    reads what they left, and each of its steps ends in the same way. Training runs everything and gives the logits of
    every decoder layer (`exits.LayerwiseObjective`); thresholds are only used afterwards. Rows of a batch decide alone.

    Parameters: ``net``. Controls: ``image`` and ``text`` (or ``joint``) and ``decoder``, thresholds.

    Attributes:
      net: factory of an `EncoderDecoder`; outside of training with ``layers="unroll"``.
      rule: of all three; its threshold is where controls start that are not in ``thresholds``.
      thresholds: starting values by name; the paper's for entailment are image 0.90, text and decoder 0.95.
      decay: of the decoder's threshold over words; ``Decay(beta=1.0)`` for none.
      self_fill: what a word that leaves after layer i puts into the self-attention caches of the layers above, at its
        own place: layer i's key and value ("copy", the released code), or those that each layer's own projections make
        of the state it left with ("recompute").
      cross_fill: keys and values of the memory in the layers above: each layer's "own", made when it first runs and
        kept; or at every exit a "copy" of layer i's (the released code).
      end: the word that ends an answer.
    """

    net: Factory
    rule: SaturationRule = SaturationRule()
    thresholds: Any = None
    decay: Decay = Decay(beta=1.0)
    self_fill: Literal["copy", "recompute"] = "copy"
    cross_fill: Literal["own", "copy"] = "own"
    end: int = 2
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.net, "SaturatingVLM.net")
        if self.self_fill not in ("copy", "recompute"):
            raise DyncompError(
                f"SaturatingVLM.self_fill={self.self_fill!r}: use 'copy' or 'recompute'"
            )
        if self.cross_fill not in ("own", "copy"):
            raise DyncompError(f"SaturatingVLM.cross_fill={self.cross_fill!r}: use 'own' or 'copy'")
        super().__post_init__()
        if unknown := sorted(set(self.thresholds or {}) - {*self.streams, "decoder"}):
            raise DyncompError(
                f"SaturatingVLM.thresholds[{unknown[0]!r}]: use {', '.join((*self.streams, 'decoder'))}"
            )

    def setup(self):  # noqa: D102
        self.inner = self.net(dtypes=self.dtypes)

    def template(self) -> EncoderDecoder:
        """The network without variables."""
        return self.net(dtypes=self.dtypes, parent=None)

    @property
    def layers(self) -> str:
        """How the network runs its layers; `layout.apply` reads it."""
        return self.template().layers

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of what the encoder reads for itself."""
        return ("joint",) if self.template().streams == "joint" else ("image", "text")

    def initial(self) -> dict[str, float]:
        """Starting threshold of every control."""
        start = dict.fromkeys((*self.streams, "decoder"), self.rule.initial())
        return {**start, **(self.thresholds or {})}

    @nn.compact  # the only method with controls: segments get their threshold as an argument
    def __call__(
        self,
        inputs: Float[Array | np.ndarray, "b m"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[dict[str, Array], Aux]:
        """Reads rows of `ImageTextRow` and gives logits of the words that follow those in ``answer``.

        Args:
          mask: [b t], 1 for words that count; words of mask 0 are run like others but charged to nobody.
          capture: "plan" for the `ExitPlan` of each stream and of the words (rows: examples by words).

        Returns:
          In training ``layers`` [l b t v], the logits of every decoder layer, and ``emitted`` and ``final``
          [b t v], the last one's. Else ``emitted``, with exits and the caches they leave, word by word with the words
          of the row (so an answer is right throughout just where greedy writing gives it); ``final``, without exits;
          ``image_layers``, ``text_layers`` [b], ``decoder_layers`` [b t], layers run; ``time`` [b t], layers run over
          all layers with the encoder charged to every word (1 - expected time reduction).
        """
        controls = {
            name: jnp.asarray(self.variable("controls", name, jnp.float32, value).value)
            for name, value in self.initial().items()
        }
        states, real, seen = self._encoded(inputs, train)
        words = self.inner.row.unpack(inputs)[2]
        whole = self.inner.remember(*(x[-1] for x in states.values()))
        layers = self.inner.classify(self.inner.decode(whole, seen, words, train)[1:])
        if train or self.is_initializing():
            ran = price.everything(self.template(), real, words.shape)
            output = {"layers": layers, "emitted": layers[-1], "final": layers[-1]}
            return output, Aux(events=price.events(self.template(), real, ran, mask))
        memory, plans = self._leave(states, real, controls)
        carry, scores = self.write(memory, seen, words, controls["decoder"])
        output, ran = self._told(carry, plans, real)
        plans["decoder"] = ExitPlan(
            carry["depth"].reshape(-1) - 1, scores.reshape(-1, scores.shape[-1])
        )
        fills = self.self_fill == "recompute"
        events = price.events(self.template(), real, ran, mask, fills=fills)
        output |= {"emitted": carry["logits"], "final": layers[-1]}
        return output, Aux(events=events, plans=plans if "plan" in capture else {})

    def _encoded(self, inputs: Any, train: bool = False) -> tuple[dict[str, Array], Any, Array]:
        """(raw states [l+1 b n d], real positions [b n]) of every stream by name, and all of the latter in a row."""
        images, text, _ = self.inner.row.unpack(inputs)
        read = self.inner.streams_of(images, text)
        states = {name: self.inner.encode(x, real, train) for name, (x, real) in read.items()}
        real = {name: mask for name, (_, mask) in read.items()}
        return states, real, jnp.concatenate(list(real.values()), axis=1)

    def _told(self, carry: Carry, plans: Mapping[str, ExitPlan], real: Any) -> tuple[dict, dict]:
        """Layers run, as outputs and as `saturating_cost.Ran`."""
        ran = {name: plans[name].exit + 1 for name in self.streams}
        ran["decoder"] = carry["depth"]
        output = {f"{name}_layers": layers for name, layers in ran.items()}
        output["time"] = price.time_share(self.template(), real, ran)
        return output, {**ran, "made": carry["made"]}

    def states(
        self, inputs: Float[Array | np.ndarray, "b m"]
    ) -> dict[str, tuple[Float[Array, "l1 b n d"], Bool[Array, "b n"]]]:
        """Of every stream the raw states at all depths (the embedded first), and which positions are real."""
        states, real, _ = self._encoded(inputs)
        return {name: (x, real[name]) for name, x in states.items()}

    def _leave(self, states: Any, real: Any, thresholds: Any) -> tuple[Array, dict[str, ExitPlan]]:
        """The memory that streams leave, and where each left."""
        plans, left = {}, []
        for name, x in states.items():
            plans[name] = saturated(similarities(x, real[name]), thresholds[name])
            left.append(_at(x[1:], plans[name].exit))
        return self.inner.remember(*left), plans

    def generate(
        self, inputs: Float[Array | np.ndarray, "b m"], thresholds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Greedy writing from the first word of ``answer``, masked.

        Args:
          inputs: as in a call; the other words are not looked at.
          thresholds: of every control.

        Returns:
          ``words`` int32 [b t], up to the end, then 0; ``decoder_layers`` [b t], 0 after the end; ``time`` [b t] and
          the streams' layers as in a call; ``logits`` [b t v]; ``made`` bool [b l], which layers made keys and values.
        """
        states, real, seen = self._encoded(inputs)
        memory, plans = self._leave(states, real, thresholds)
        words = self.inner.row.unpack(inputs)[2]
        carry, _ = self.write(memory, seen, words, thresholds["decoder"], free=True)
        output, ran = self._told(carry, plans, real)
        chosen = jnp.argmax(carry["logits"], axis=-1).astype(jnp.int32)
        said = jnp.where(carry["depth"] > 0, chosen, 0)
        return {**output, "words": said, "logits": carry["logits"], "made": ran["made"]}

    # ---- writing, one word of each row at a time

    def write(
        self,
        memory: Float[Array, "b s d"],
        seen: Bool[Array, "b s"],
        words: Int[Array, "b t"],
        threshold: Float[Array, ""],
        free: bool = False,
    ) -> tuple[Carry, Float[Array, "b t l"]]:
        """Writes as many words as ``words`` has, masked: every layer runs for everyone, and a row keeps what it needs.

        Args:
          words: what is read at each step; with ``free`` only the first, and then what was written.
          free: also end where the end is written: ``depth`` is 0 for words after it.

        Returns:
          The last carry, and the similarities that decided (NaN where a row had left or the layer is the last).
        """
        depth = self.template().decoder_depth
        fresh = [self.inner.keys_values(index, memory) for index in range(depth)]

        def word(self: "SaturatingVLM", state: Any, _: Any) -> Any:
            carry, going = state
            active, said = going, []
            for index in range(depth):
                first = active & ~carry["known"][:, index]
                carry = _where(first, self.keys(index, carry, fresh[index]), carry)
                new, leave, score = self.layer(index, carry, threshold)
                carry = _where(active, new, carry)
                said.append(jnp.where(active, score, jnp.nan))
                active = active & ~leave
            new, ended = self.finish(carry, free)
            carry = _where(going, new, carry)
            return (carry, going & ~ended if free else going), jnp.stack(said, axis=1)

        scan = nn.scan(
            word,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=words.shape[1],
            out_axes=1,
        )
        start = self.start(memory, seen, words), jnp.ones(words.shape[:1], bool)
        (carry, _), scores = scan(self, start, None)
        return carry, scores

    def start(
        self, memory: Float[Array, "b s d"], seen: Bool[Array, "b s"], words: Int[Array, "b t"]
    ) -> Carry:
        """Before the first word; caches are empty."""
        net = self.template()
        (b, t), depth = words.shape, net.decoder_depth
        block = net.blocks()[1](parent=None, dtypes=self.dtypes)
        _, kv_heads, head_dim = block.mixer(parent=None, dtypes=self.dtypes).sizes(net.d_model)
        dtype, shape = (
            self.dtypes.compute,
            (b, memory.shape[1], block.heads, net.d_model // block.heads),
        )
        cache = {
            "mixer": RowSlots(t).init(b, kv_heads, head_dim, dtype),
            "keys": jnp.zeros(shape, dtype),
            "values": jnp.zeros(shape, dtype),
        }
        step = jnp.zeros((b,), jnp.int32)
        return {
            "step": step,
            "x": self.inner.embed_words(words[:, :1], step[:, None]),
            "words": words,
            "logits": jnp.zeros((b, t, net.vocab_size), jnp.float32),
            "depth": jnp.zeros((b, t), jnp.int32),
            "memory": memory,
            "seen": seen,
            "caches": [cache] * depth,
            "known": jnp.zeros((b, depth), bool),
            "made": jnp.zeros((b, depth), bool),
        }

    def keys(self, index: int, carry: Carry, pair: tuple[Array, Array] | None = None) -> Carry:
        """The memory's keys and values of one layer, before it first runs for a row; then they are ``known``.

        ``made`` tells a layer's own from copies. ``pair``: the same keys and values, where they are there.
        """
        keys, values = pair or self.inner.keys_values(index, carry["memory"])
        cache = {**carry["caches"][index], "keys": keys, "values": values}
        mark = lambda name: carry[name].at[:, index].set(True)
        own = _replaced(carry["caches"], index, cache)
        return {**carry, "caches": own, "known": mark("known"), "made": mark("made")}

    def layer(
        self, index: int, carry: Carry, threshold: Float[Array, ""]
    ) -> tuple[Carry, Bool[Array, "b"], Float[Array, "b"]]:
        """One layer for one word: (carry, leave, score); rows that leave fill the caches above."""
        net, step, old = self.inner, carry["step"], carry["x"]
        own = carry["caches"][index]
        new, cache = net.decoder_block(index, old, step, own, carry["seen"])
        depth = carry["depth"].at[jnp.arange(step.shape[0]), step].set(index + 1)
        caches = _replaced(carry["caches"], index, cache)
        carry = {**carry, "x": new, "depth": depth, "caches": caches}
        if index == net.decoder_depth - 1:
            nothing = jnp.full(step.shape, jnp.nan, jnp.float32)
            return carry, jnp.ones(step.shape, bool), nothing
        own_threshold = self.decay.at(threshold, step, carry["words"].shape[1])
        _, leave, score = self.rule.step(self.rule.start(old), new, None, own_threshold)
        return self._filled(index, carry, leave), leave, score

    def _filled(self, index: int, carry: Carry, leave: Bool[Array, "b"]) -> Carry:
        """What rows that leave after layer ``index`` put into the caches above."""
        caches, own = list(carry["caches"]), carry["caches"][index]
        step, x, seen = carry["step"], carry["x"], carry["seen"]
        for above in range(index + 1, len(caches)):
            cache = caches[above]
            source = own["mixer"]
            if self.self_fill == "recompute":
                # The block runs for its keys and values alone: the compiler drops the rest.
                source = self.inner.decoder_block(above, x, step, cache, seen)[1]["mixer"]
            filled = {**cache, "mixer": copy_slot(cache["mixer"], source, step, leave)}
            if self.cross_fill == "copy":
                pairs = {name: own[name] for name in ("keys", "values")}
                filled |= _where(leave, pairs, {name: cache[name] for name in pairs})
            caches[above] = filled
        known = carry["known"]
        if self.cross_fill == "copy":
            known = known.at[:, index + 1 :].set(known[:, index + 1 :] | leave[:, None])
        return {**carry, "caches": caches, "known": known}

    def finish(self, carry: Carry, free: bool = True) -> tuple[Carry, Bool[Array, "b"]]:
        """Writes the word and reads the next: (carry, ended). ``free`` as in `write`."""
        step, words = carry["step"], carry["words"]
        rows, last = jnp.arange(step.shape[0]), words.shape[1] - 1
        said = self.inner.classify(carry["x"])[:, 0]
        chosen = jnp.argmax(said, axis=-1).astype(jnp.int32)
        ended = step >= last
        after = jnp.minimum(step + 1, last)
        if free:
            words = words.at[rows, after].set(jnp.where(ended, words[rows, after], chosen))
            ended = ended | (chosen == self.end)
        x = self.inner.embed_words(words[rows, after][:, None], after[:, None])
        logits = carry["logits"].at[rows, step].set(said)
        return {**carry, "step": after, "x": x, "words": words, "logits": logits}, ended

    # ---- segments (`runtime.from_saturating`)

    def begin(self, inputs: Float[Array | np.ndarray, "b m"]) -> Carry:
        """What is carried from segment to segment: the streams (``read``, ``real``) and an empty `start`."""
        images, text, words = self.inner.row.unpack(inputs)
        read = self.inner.streams_of(images, text)
        x = jnp.concatenate([x for x, _ in read.values()], axis=1)
        real = {name: mask for name, (_, mask) in read.items()}
        seen = jnp.concatenate(list(real.values()), axis=1)
        own = {"read": {name: x for name, (x, _) in read.items()}, "real": real}
        return {**own, **self.start(jnp.zeros_like(x), seen, words)}

    def stream_layer(
        self, name: str, index: int, carry: Carry, threshold: Float[Array, ""]
    ) -> tuple[Carry, Bool[Array, "b"], Float[Array, "b"]]:
        """One layer of a stream: (carry, leave, score)."""
        old, real = carry["read"][name], carry["real"][name]
        new = self.inner.encoder_block(index, old, real)
        carry = {**carry, "read": {**carry["read"], name: new}}
        if index == self.inner.encoder_depth - 1:
            b = new.shape[0]
            return carry, jnp.ones((b,), bool), jnp.full((b,), jnp.nan, jnp.float32)
        _, leave, score = self.rule.step(self.rule.start(old), new, real, threshold)
        return carry, leave, score

    def remember(self, carry: Carry) -> Carry:
        """The streams' states become the memory."""
        return {**carry, "memory": self.inner.remember(*(carry["read"][n] for n in self.streams))}

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices of all events; see `saturating_cost`."""
        return price.prices(self.template(), self.rule)


def _at(states: Float[Array, "l b n d"], index: Int[Array, "b"]) -> Float[Array, "b n d"]:
    """Of every example the state at its own depth."""
    return jnp.take_along_axis(states, index[None, :, None, None], axis=0)[0]


def _replaced(items: list[Any], index: int, item: Any) -> list[Any]:
    return [*items[:index], item, *items[index + 1 :]]


def _where(rows: Bool[Array, "b"], new: Any, old: Any) -> Any:
    """``new`` in some rows; a leaf that is the same object in both is left alone."""

    def pick(new: Array, old: Array) -> Array:
        if new is old:
            return old
        return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(pick, new, old)
