"""Exact caches for decode steps that exit early: blocks catch up when a later token needs them.

::

    exits after 2 and 4 of 6 blocks; ----- ran when the token came, ~~~~~ ran later, together with a newer token

    token      a      b      c      d
    blocks 5-6 -----                ~b~c~d-      d needs them: they run for b, c and d at once
    blocks 3-4 -----         -b-c-               c left after block 4, and took b along
    blocks 1-2 ----- -----   -----  -----

A segment's cache ends where it last ran, so that the next run appends exactly the tokens that are missing. Their states
wait in front of the first segment that they have not run. When as many wait as there is room for, the token goes deep.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.attention import CacheState, HeavyHitters, MixedPrecision, TokenSelection, truncate
from dyncomp.core.aux import Count, count
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp.decoding.exiting import check_exits
from dyncomp.decoding.net import Net, gather_events
from dyncomp.decoding.policies import Plain, Step
from dyncomp.decoding.reading import cache_policies
from dyncomp.decoding.rules import Confident, LeaveRule, Readout, SharedHead
from dyncomp.models import layer_caches, with_layer_caches


@struct.dataclass
class Waiting:
    """Tokens that wait before a segment, oldest first.

    Attributes:
      x: [b 2w d], their states; only the first ``count`` slots mean anything, at most w.
      positions: int32 [b 2w].
      mask: bool [b 2w].
      count: int32 [], the same for all rows.
    """

    x: Float[Array, "b w d"]
    positions: Int[Array, "b w"]
    mask: Bool[Array, "b w"]
    count: Int[Array, ""]

    def append(self, other: "Waiting", width: int) -> "Waiting":
        """With the first ``width`` slots of ``other``, of which its ``count`` are tokens, behind the own ones."""
        put = lambda own, new: lax.dynamic_update_slice_in_dim(own, new[:, :width], self.count, 1)
        return Waiting(
            put(self.x, other.x),
            put(self.positions, other.positions),
            put(self.mask, other.mask),
            self.count + other.count,
        )


@dataclasses.dataclass(frozen=True)
class ExitAndCatchUp(Plain):
    """Leaves early like `exiting.ExitEarly`, with the caches that full depth would have left.

    All rows leave together, at the first exit where all want to; the prompt and the first token run all blocks.
    Controls: those of ``rule``.

    Attributes:
      exits, readout, rule: as `exiting.ExitEarly`.
      window: most tokens that wait, in all.
    """

    exits: tuple[int, ...]
    readout: Readout = SharedHead()
    rule: LeaveRule = Confident()
    window: int = 16

    def check(self, model: Any) -> None:
        """Refuses exits that the model does not have, and caches that would not be those of full depth."""
        check_exits(self.exits, model.depth)
        check_catches_up(model)
        if self.window < 2:
            raise DyncompError(f"ExitAndCatchUp.window={self.window}: let at least 2 tokens wait")
        if not self.rule.reads_logits:
            raise DyncompError(
                f"ExitAndCatchUp asks its rule for logits only; use {type(self.rule).__name__} with ExitEarly"
            )

    def controls(self) -> Any:
        """Nobody leaves."""
        return self.rule.controls(len(self.exits))

    def slack(self) -> int:
        """Blocks that catch up may write padding behind the tokens."""
        return 2 * self.window

    def cost(self, model: Any) -> dict[str, Any]:
        """Price of an exit's head."""
        return {"exits": {"rows": self.readout.cost(model)}}

    def start(self, net: Net, hidden: Array, aux: Any, controls: Any) -> Step:
        """Nobody waits."""
        first = super().start(net, hidden, aux, controls)
        b, w = hidden.shape[0], 2 * self.window
        nobody = lambda: Waiting(
            jnp.zeros((b, w, net.model.d_model), hidden.dtype),
            jnp.zeros((b, w), jnp.int32),
            jnp.zeros((b, w), bool),
            jnp.int32(0),
        )
        return first._replace(state=[nobody() for _ in self.exits])

    def step(self, net, token, positions, mask, cache, state, controls) -> Step:
        """Segment by segment, each for all who wait before it, until all rows leave."""
        walk = _Walk(self, net, positions, mask, jax.tree.map(jnp.asarray, controls))
        return walk(token, layer_caches(cache), list(state), cache)

    @property
    def widths(self) -> tuple[int, ...]:
        """How many tokens a block is compiled to catch up with: powers of two, and the window."""
        powers = [2**n for n in range(self.window.bit_length()) if 2**n < self.window]
        return (*powers, self.window)


BY_PASS = HeavyHitters, MixedPrecision, TokenSelection
"""Caches that decide once a pass what to keep or to read, for all of its tokens."""


def check_catches_up(model: Any) -> None:
    """Refuses caches that hold something else when tokens come several at once instead of one by one."""
    for policy in cache_policies(model):
        if isinstance(policy, BY_PASS):
            raise DyncompError(
                f"ExitAndCatchUp runs tokens together, and {type(policy).__name__} decides once a pass what it keeps or"
                " reads: not what full depth would; use FullCache, or ExitEarly"
            )


@dataclasses.dataclass
class _Walk:
    """One step."""

    policy: ExitAndCatchUp
    net: Net
    positions: Array
    mask: Array
    controls: Any

    def __call__(self, token: Array, caches: list[Any], waiting: list[Waiting], cache: Any) -> Step:
        net, exits = self.net, self.policy.exits
        edges, b = (0, *exits, net.model.depth), token.shape[0]
        left, stop = jnp.zeros((), bool), jnp.zeros((b,), bool)
        depth, found, reads = jnp.full((b,), net.model.depth, jnp.int32), [], []
        x = net.embed(token, self.positions)
        now = Waiting(x, self.positions, self.mask, jnp.int32(1))
        logits = jnp.zeros((b, net.model.vocab_size), jnp.float32)
        for segment, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            span, own = range(first, last), caches[first:last]
            if segment == 0:
                outputs, caches[first:last], events = self._run(span, now, own)
                newest, width = outputs, 1
            else:
                outputs, caches[first:last], events, newest = lax.cond(
                    left, self._skip(span), self._catch_up(span), waiting[segment - 1], own
                )
                waiting[segment - 1] = _cleared(waiting[segment - 1], ~left)
                width = self.policy.window
            found += zip(span, events, strict=True)
            if segment < len(exits):
                count_out = jnp.where(left, 0, outputs.count)
                waiting[segment] = waiting[segment].append(
                    dataclasses.replace(outputs, count=count_out), width
                )
            said = self._read(segment, newest.x, left)
            reads.append(count(jnp.where(left, 0, jnp.sum(self.mask)), jnp.where(left, 0, b)))
            logits = jnp.where(left, logits, said)
            if segment < len(exits):
                leave, ends = self._decide(segment, said, newest.x, waiting)
                stop, depth = stop | (ends & ~left), jnp.where(~left & leave, last, depth)
                left = left | leave
        events = self._events(found, reads)
        return Step(logits, with_layer_caches(cache, caches), waiting, events, depth, stop)

    def _decide(self, segment: int, logits: Array, x: Array, waiting: list[Waiting]) -> Any:
        """Whether all leave here, and who ends; nobody leaves when there is no room to wait."""
        own = jax.tree.map(lambda c: c[segment], self.controls)
        leave, ends = self.policy.rule.leave(self.net, logits, x, own)
        room = sum(w.count for w in waiting) < self.policy.window
        return jnp.all(leave | ends | ~self.mask[:, 0]) & room, ends

    def _read(self, segment: int, x: Array, left: Array) -> Array:
        net, last = self.net, segment == len(self.policy.exits)

        def say(x: Array) -> Array:
            return net.classify(x)[:, -1] if last else self.policy.readout.logits(net, segment, x)

        nothing = jnp.zeros((x.shape[0], net.model.vocab_size), jnp.float32)
        return lax.cond(left, lambda x: nothing, say, x)

    def _run(self, span: range, rows: Waiting, caches: list[Any]) -> tuple[Waiting, list, list]:
        """The blocks of ``span`` on ``rows``, of which the first ``count`` are tokens; caches end behind those."""
        real = rows.mask & (jnp.arange(rows.x.shape[1]) < rows.count)[None]
        x, own, events = rows.x, [], []
        for index, cache in zip(span, caches, strict=True):
            x, after, counted = self.net.block(index, x, rows.positions, real, cache)
            own.append(_ending(after, cache, rows.count))
            events.append(counted)
        return dataclasses.replace(rows, x=x), own, events

    def _catch_up(self, span: range) -> Any:
        """Runs all who wait, in the smallest width that holds them."""
        window, widths = self.policy.window, self.policy.widths

        def at(width: int) -> Any:
            def run(rows: Waiting, caches: list[Any]) -> Any:
                short = dataclasses.replace(
                    rows, **{n: getattr(rows, n)[:, :width] for n in FIELDS}
                )
                outputs, caches, events = self._run(span, short, caches)
                newest = lax.dynamic_slice_in_dim(outputs.x, rows.count - 1, 1, axis=1)
                full = {n: _padded(getattr(outputs, n), window) for n in FIELDS}
                return dataclasses.replace(outputs, **full), caches, events, _single(newest, self)

            return run

        def choose(rows: Waiting, caches: list[Any]) -> Any:
            which = jnp.sum(rows.count > jnp.asarray(widths), dtype=jnp.int32)
            return lax.switch(which, [at(width) for width in widths], rows, caches)

        return choose

    def _skip(self, span: range) -> Any:
        """Nothing runs, and the caches stay as long as they are."""

        def skip(rows: Waiting, caches: list[Any]) -> Any:
            shapes = jax.eval_shape(lambda *given: self._catch_up(span)(*given)[2], rows, caches)
            events = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            short = {n: getattr(rows, n)[:, : self.policy.window] for n in FIELDS}
            return dataclasses.replace(rows, **short), caches, events, _single(rows.x[:, :1], self)

        return skip

    def _events(self, found: list[Any], reads: list[Count]) -> dict[str, Any]:
        seen = count(jnp.sum(self.mask, dtype=jnp.int32), self.mask.size)
        early = Count(sum(c.needed for c in reads[:-1]), sum(c.executed for c in reads[:-1]))
        own = gather_events(self.net, found)
        return {"embed": {"tokens": seen}, **own, "exits": {"rows": early},
                "head": {"tokens": reads[-1]}}  # fmt: skip


FIELDS = ("x", "positions", "mask")


def _single(x: Array, walk: _Walk) -> Waiting:
    """The newest token alone."""
    return Waiting(x, walk.positions, walk.mask, jnp.int32(1))


def _padded(x: Array, width: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _cleared(rows: Waiting, done: Array) -> Waiting:
    return dataclasses.replace(rows, count=jnp.where(done, 0, rows.count))


def _ending(after: Any, before: Any, tokens: Array) -> Any:
    """A block's cache without the padding that was written behind its new tokens."""
    cut = lambda new, old: truncate(new, old.length + tokens)
    return jax.tree.map(cut, after, before, is_leaf=lambda node: isinstance(node, CacheState))
