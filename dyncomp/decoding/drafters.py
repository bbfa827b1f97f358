"""The drafters of speculative decoding; their seam is `drafting.Drafter`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.attention import truncate
from dyncomp.core.aux import count
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Variables
from dyncomp.decoding.drafting import (
    Drafted,
    Request,
    add_turn,
    blank_round,
    draft_turns,
)
from dyncomp.decoding.net import Net, gather_events, separate
from dyncomp.decoding.reading import Reading, begin, check_rows, each_cache, newest, read, unread
from dyncomp.decoding.rules import Readout, SharedHead
from dyncomp.decoding.written import check_vocabularies
from dyncomp.models import DecoderLM, layer_caches, with_layer_caches


@struct.dataclass
class Behind:
    """What a drafting model has read, and what it has to read first.

    Attributes:
      reading: its own.
      tokens: int32 [b 2], the text's newest, oldest first.
      counts: int32 [b], how many of them: 2 where all drafts were kept, the last of which it never read.
    """

    reading: Reading
    tokens: Int[Array, "b 2"]
    counts: Int[Array, "b"]


class _Whole:
    """A target that reads the newest token and all drafts itself."""

    def weights(self) -> Any:
        """None but the target's."""
        return None

    def cost(self, target: DecoderLM) -> dict[str, Any]:
        """The target's prices."""
        return target.cost((1, 1))

    def start(self, weights, tokens, counts, newest, capacity) -> tuple[Any, Any]:
        """Nothing to remember."""
        return None, None

    def verify(self, net: Net, drafted: Drafted, tokens: Array, counts: Array) -> Any:
        """All of it."""
        return read(net, drafted.reading, tokens, counts)

    def settle(self, state, request, drafted, accepted, own) -> Any:
        """Nothing to remember."""
        return state


class OtherModel(_Whole):
    """A smaller model of the same vocabulary, with a cache of its own (arXiv 2211.17192, 2302.01318).

    Args:
      model, variables: as stored.
    """

    def __init__(self, model: DecoderLM, variables: Variables):
        self.model, self._variables = separate(model, variables)

    def check(self, target: DecoderLM) -> None:
        """Refuses a vocabulary of another size; `pretrained.check_pair` compares the tokenizers too."""
        check_vocabularies(draft=self.model, target=target)

    def weights(self) -> Any:
        """Its variables."""
        return self._variables

    def cost(self, target: DecoderLM) -> dict[str, Any]:
        """Its own prices."""
        return self.model.cost((1, 1))

    def start(self, weights, tokens, counts, newest, capacity) -> tuple[Any, Any]:
        """Reads the prompts too."""
        check_rows(self.model, tokens.shape[0])
        blank = begin(self.model, tokens.shape[0], capacity)
        _, reading, events = read(Net(self.model, weights), blank, tokens, counts)
        first = jnp.stack([newest, jnp.zeros_like(newest)], axis=1)
        return Behind(reading, first, jnp.ones_like(newest)), events

    def draft(self, net: Net, weights: Any, state: Behind, request: Request) -> Drafted:
        """Catches up with the text, then goes on by itself; never reads its last draft."""
        own = Net(self.model, weights)
        counts = jnp.where(request.going, state.counts, 0)

        def turn(reading: Reading, token: Array, place: Array) -> Any:
            x, after, events = read(
                own, reading, token, (place < request.lengths).astype(jnp.int32)
            )
            return own.classify(x)[:, 0], after, events

        now = blank_round(request, turn, state.reading)
        x, reading, events = read(own, state.reading, state.tokens, counts)
        logits = own.classify(newest(x, counts))[:, 0]
        now = add_turn(now, request, jnp.int32(0), logits, reading, events)
        now = draft_turns(now, request, turn, 1)
        return Drafted(now.tokens, now.proposed, request.reading, now.memory, None, now.events)

    def settle(self, state: Behind, request, drafted, accepted, own) -> Behind:
        """Takes back refused drafts; where none was refused, the last one is still to be read."""
        counts = jnp.where(request.going, state.counts, 0)
        start = state.reading.slots + jnp.max(counts)
        kept = jnp.minimum(accepted, jnp.maximum(request.lengths - 1, 0))
        reading = unread(drafted.state, start, state.reading.read + counts, kept)
        last = jnp.take_along_axis(drafted.tokens, jnp.maximum(request.lengths - 1, 0)[:, None], 1)
        all_kept = ((accepted == request.lengths) & (request.lengths > 0))[:, None]
        own = own[:, None]
        tokens = jnp.where(
            all_kept, jnp.concatenate([last, own], 1), jnp.pad(own, ((0, 0), (0, 1)))
        )
        return Behind(reading, tokens, 1 + all_kept[:, 0].astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class SkipLayers(_Whole):
    """The target without some of its blocks (self-speculation, arXiv 2309.08168), on the target's own cache.

    What the drafts leave in the cache is taken back; the target then reads them with all blocks.

    Attributes:
      layers: blocks that draft, in order (`dyncomp.depth`).
    """

    layers: tuple[int, ...]

    def check(self, target: DecoderLM) -> None:
        """Refuses blocks that the target does not have."""
        own = self.layers
        if not own or list(own) != sorted(set(own)) or own[0] < 0 or own[-1] >= target.depth:
            raise DyncompError(
                f"SkipLayers.layers={own}: give increasing indices below {target.depth}"
            )

    def draft(self, net: Net, weights: Any, state: Any, request: Request) -> Drafted:
        """The kept blocks, token by token."""
        caches = layer_caches(request.reading.cache)
        own = [caches[index] for index in self.layers]

        def turn(own: list[Any], token: Array, place: Array) -> Any:
            mask = (place < request.lengths)[:, None]
            positions = jnp.where(mask, request.reading.read[:, None] + place, 0)
            x, own, events = _run(
                net, self.layers, net.embed(token, positions), positions, mask, own
            )
            return net.classify(x)[:, 0], own, {**events, **_ends(mask, "embed", "head")}

        now = draft_turns(blank_round(request, turn, own), request, turn, 0)
        for index, cache in zip(self.layers, _cut(now.memory, request.reading.slots), strict=True):
            caches[index] = cache
        cache = with_layer_caches(request.reading.cache, caches)
        reading = Reading(cache, request.reading.read)
        return Drafted(now.tokens, now.proposed, reading, state, None, now.events)


@dataclasses.dataclass(frozen=True)
class FirstLayers(_Whole):
    """The target's first blocks (LayerSkip, arXiv 2404.16710): the target goes on from their outputs and caches.

    Attributes:
      blocks: how many, at least 1 and fewer than all.
      readout: logits after them.
    """

    blocks: int
    readout: Readout = SharedHead()

    def check(self, target: DecoderLM) -> None:
        """Refuses what leaves nothing to draft with or to verify."""
        if not 1 <= self.blocks < target.depth:
            raise DyncompError(f"FirstLayers.blocks={self.blocks}: use 1 to {target.depth - 1}")

    def cost(self, target: DecoderLM) -> dict[str, Any]:
        """The target's prices, and the readout's for the head."""
        return {**target.cost((1, 1)), "head": {"tokens": self.readout.cost(target)}}

    def draft(self, net: Net, weights: Any, state: Any, request: Request) -> Drafted:
        """The first blocks read the newest token and every draft, the last one too: the target needs it."""
        b, start = request.newest.shape[0], request.reading.read
        span, caches = tuple(range(self.blocks)), layer_caches(request.reading.cache)
        wants = jnp.where(request.going, request.lengths, -1)

        def below(memory: Any, token: Array, place: Array) -> Any:
            outputs, own = memory
            mask = (place <= wants)[:, None]
            positions = jnp.where(mask, start[:, None] + place, 0)
            x, own, events = _run(net, span, net.embed(token, positions), positions, mask, own)
            outputs = jnp.where((jnp.arange(request.k + 1) == place)[None, :, None], x, outputs)
            return x, (outputs, own), {**events, **_ends(mask, "embed")}

        def turn(memory: Any, token: Array, place: Array) -> Any:
            x, memory, events = below(memory, token, place)
            head = _ends((place < request.lengths)[:, None], "head")
            return self.readout.logits(net, 0, x), memory, {**events, **head}

        blank = jnp.zeros((b, request.k + 1, net.model.d_model), net.model.dtypes.compute)
        now = blank_round(request, turn, (blank, caches[: self.blocks]))
        now = draft_turns(now, request, turn, 0)
        most = jnp.max(request.lengths)
        last = jnp.take_along_axis(now.tokens, jnp.full((b, 1), jnp.maximum(most - 1, 0)), axis=1)
        last = jnp.where(most == 0, request.newest[:, None], last)
        _, (outputs, own), events = below(now.memory, last, most)
        events = {**events, "head": {"tokens": count(0)}}
        events = jax.tree.map(jnp.add, now.events, events)
        cache = with_layer_caches(request.reading.cache, [*own, *caches[self.blocks :]])
        return Drafted(now.tokens, now.proposed, Reading(cache, start), state, outputs, events)

    def verify(self, net: Net, drafted: Drafted, tokens: Array, counts: Array) -> Any:
        """The blocks above."""
        column = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        mask, positions = column < counts[:, None], drafted.reading.read[:, None] + column
        caches, span = (
            layer_caches(drafted.reading.cache),
            tuple(range(self.blocks, net.model.depth)),
        )
        x, own, events = _run(net, span, drafted.outputs, positions, mask, caches[self.blocks :])
        slots = drafted.reading.slots
        cache = with_layer_caches(
            drafted.reading.cache, [*caches[: self.blocks], *_cut(own, slots)]
        )
        return x, Reading(cache, drafted.reading.read + counts), {**events, **_ends(mask, "head")}


def _run(
    net: Net,
    span: tuple[int, ...],
    x: Float[Array, "b t d"],
    positions: Array,
    mask: Array,
    caches: Any,
) -> tuple[Float[Array, "b t d"], list[Any], dict[str, Any]]:
    """Some blocks one after another: output, their caches, events."""
    own, found = [], []
    for index, cache in zip(span, caches, strict=True):
        x, after, events = net.block(index, x, positions, mask, cache)
        own.append(after)
        found.append((index, events))
    return x, own, gather_events(net, found)


def _cut(caches: Any, slots: Array) -> Any:
    """Blocks' caches without the slots from ``slots`` on."""
    return each_cache(lambda cache: truncate(cache, slots), caches)


def _ends(mask: Array, *names: str) -> dict[str, Any]:
    """Events of the embedding or the head for the tokens of ``mask``."""
    seen = count(jnp.sum(mask, dtype=jnp.int32), mask.size)
    return {name: {"tokens": seen} for name in names}
