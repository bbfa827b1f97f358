"""Decode steps that end early, and what that leaves in the caches of the blocks above.

A token that leaves after block n gives later tokens no keys and values in blocks n+1, ... unless somebody makes them:

* ``propagate``: each block above makes them from the hidden state with which the token left, by its own norm and
  projections, and nothing else of the block runs (arXiv 2401.09964; the state propagation of early-exit decoders).
* ``copy``: each block above takes the keys and values of the last block that ran.
* none, until a later token needs the block; then the block runs for all tokens that are missing, at once, so that its
  cache is what full depth would have left. That is another policy, `pending.ExitAndCatchUp`.

Rows of a batch leave one by one, as each would alone, but a block is only skipped once all rows have left.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.attention import FullCache, KVCache, push_newest, replace_newest
from dyncomp.core.aux import Count, count
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool
from dyncomp.decoding.net import Net, gather_events
from dyncomp.decoding.policies import Plain, Step
from dyncomp.decoding.reading import cache_policies
from dyncomp.decoding.rules import Confident, LeaveRule, Readout, SharedHead
from dyncomp.models import kv_cost, layer_caches, with_layer_caches

Fill = Literal["propagate", "copy"]


@dataclasses.dataclass(frozen=True)
class ExitEarly(Plain):
    """Leaves after one of some blocks; the prompt runs all.

    Controls: those of ``rule``. The first token comes from full depth.

    Attributes:
      exits: how many blocks have run at each exit; increasing, below the model's depth.
      readout: what an exit says.
      rule: who leaves.
      fill: what is left in the caches above.
    """

    exits: tuple[int, ...]
    readout: Readout = SharedHead()
    rule: LeaveRule = Confident()
    fill: Fill = "propagate"

    def check(self, model: Any) -> None:
        """Refuses exits that the model does not have, and copies between caches that have no slots to copy."""
        check_exits(self.exits, model.depth)
        if self.fill not in ("propagate", "copy"):
            raise DyncompError(
                f"ExitEarly.fill={self.fill!r}: use 'propagate' or 'copy'; blocks that recompute what they missed are"
                " ExitAndCatchUp"
            )
        if self.fill == "copy":
            check_copies(model)

    def controls(self) -> Any:
        """Nobody leaves."""
        return self.rule.controls(len(self.exits))

    def cost(self, model: Any) -> dict[str, Any]:
        """Prices of an exit's head, and of the keys and values that a block makes without running."""
        return {
            "exits": {"rows": self.readout.cost(model)},
            "fill": {"rows": kv_cost(model)},
            "rule": {"rows": self.rule.cost(model)},
        }

    def step(self, net, token, positions, mask, cache, state, controls) -> Step:
        """Segment by segment, until all rows have left."""
        walk = _Walk(self, net, positions, mask, jax.tree.map(jnp.asarray, controls))
        return walk(token, cache, state)


def check_exits(exits: tuple[int, ...], depth: int) -> None:
    """Refuses exits that are not increasing numbers of blocks below ``depth``."""
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] >= depth:
        raise DyncompError(
            f"exits={exits}: give increasing numbers of blocks, from 1 to {depth - 1}"
        )


def check_copies(model: Any) -> None:
    """Refuses caches whose newest token another layer's cannot stand for."""
    for policy in cache_policies(model):
        if not isinstance(policy, FullCache):
            raise DyncompError(
                f"ExitEarly.fill='copy' copies slots of a FullCache, not of {type(policy).__name__}; use"
                " fill='propagate'"
            )


@dataclasses.dataclass
class _Walk:
    """One step; who has left is in ``left`` [b]."""

    policy: ExitEarly
    net: Net
    positions: Array
    mask: Array
    controls: Any

    def __call__(self, token: Array, cache: Any, state: Any) -> Step:
        net, policy = self.net, self.policy
        b, depth = token.shape[0], net.model.depth
        caches, x = layer_caches(cache), net.embed(token, self.positions)
        left, stop = ~self.mask[:, 0], jnp.zeros((b,), bool)
        logits = jnp.zeros((b, net.model.vocab_size), jnp.float32)
        ran = jnp.full((b,), depth, jnp.int32)
        found, exits, fills, asked = [], [], [], []
        edges = (0, *policy.exits, depth)
        for segment, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            span = range(first, last)
            below = caches[first - 1] if segment else None
            x, own, events, filled = self._segment(span, x, [caches[i] for i in span], left, below)
            caches[first:last] = own
            found += zip(span, events, strict=True)
            fills.append(filled)
            said, leave, ends, reads = self._decide(segment, x, left)
            asked.append(count(jnp.sum(~left), jnp.where(jnp.all(left), 0, b)))
            exits.append(count(jnp.sum(reads), jnp.where(jnp.any(reads), b, 0)))
            logits = jnp.where(reads[:, None], said, logits)
            ran = jnp.where(~left & (leave | ends), last, ran)
            stop, left = stop | (ends & ~left), left | leave | ends
        seen = count(jnp.sum(self.mask, dtype=jnp.int32), b)
        events = {
            "embed": {"tokens": seen},
            **gather_events(net, found),
            "exits": {"rows": _total(exits[:-1])},
            "fill": {"rows": _total(fills)},
            "head": {"tokens": exits[-1]},
            "rule": {"rows": _total(asked if not policy.rule.reads_logits else asked[:-1])},
        }
        return Step(logits, with_layer_caches(cache, caches), state, events, ran, stop)

    def _decide(self, segment: int, x: Array, left: Bool[Array, "b"]) -> tuple[Array, ...]:
        """After a segment: logits, who leaves, who ends, and whose logits were read (others' mean nothing)."""
        rule, last = self.policy.rule, segment == len(self.policy.exits)
        nobody = jnp.zeros_like(left)
        if rule.reads_logits and last:
            return self._read(segment, x, ~left), nobody, nobody, ~left
        own = jax.tree.map(lambda c: c[segment], self.controls)
        if rule.reads_logits:
            said = self._read(segment, x, ~left)
            return said, *rule.leave(self.net, said, x, own), ~left
        leave, ends = rule.leave(self.net, None, x, own)
        leave = ~ends if last else leave
        reads = ~left & leave
        return self._read(segment, x, reads), leave, ends, reads

    def _read(self, segment: int, x: Array, reads: Bool[Array, "b"]) -> Array:
        """Logits after a segment; zeros, for nothing, when nobody reads them."""
        net, last = self.net, segment == len(self.policy.exits)

        def say(x: Array) -> Array:
            return net.classify(x)[:, -1] if last else self.policy.readout.logits(net, segment, x)

        if segment == 0 and self.policy.rule.reads_logits:
            return say(x)
        shape = (x.shape[0], net.model.vocab_size)
        return lax.cond(jnp.any(reads), say, lambda x: jnp.zeros(shape, jnp.float32), x)

    def _segment(self, span: range, x: Array, caches: list[Any], left: Array, below: Any) -> Any:
        """Runs the blocks of ``span`` unless all have left; rows that have left keep their state.

        Returns:
          x, the blocks' caches, their events, and the rows whose keys and values were made without running.
        """
        if below is None:
            y, caches, events = self._run(span, x, caches, left)
            return y, caches, events, count(0)
        parts = x, caches, below

        def run(x: Array, caches: list[Any], below: Any) -> Any:
            y, caches, events = self._run(span, x, caches, left)
            return y, self._filled(caches, below, left), events

        shapes = jax.eval_shape(lambda *given: run(*given)[2], *parts)
        skip = lambda x, caches, below: self._skip(span, x, caches, below, shapes)
        y, caches, events = lax.cond(jnp.all(left), skip, run, *parts)
        made = 0 if self.policy.fill == "copy" else len(span)
        rows = jnp.sum(left & self.mask[:, 0], dtype=jnp.int32) * made
        return y, caches, events, count(rows, jnp.where(jnp.all(left), made * x.shape[0], 0))

    def _run(self, span: range, x: Array, caches: list[Any], left: Array) -> Any:
        """Every block on every row; the events need only rows that have not left."""
        own, events = [], []
        still = self.mask & ~left[:, None]
        for index, cache in zip(span, caches, strict=True):
            y, after, _ = self.net.block(index, x, self.positions, self.mask, cache)
            events.append(self.net.block(index, x, self.positions, still, cache)[2])
            x = jnp.where(left[:, None, None], x, y)
            own.append(after)
        return x, own, events

    def _filled(self, caches: list[Any], below: Any, left: Array) -> list[Any]:
        """After a run: rows that had left before get copied keys and values where that is the policy."""
        if self.policy.fill != "copy":
            return caches
        take = lambda cache, source: replace_newest(cache, source, left)
        return [_each(take, cache, below) for cache in caches]

    def _skip(self, span: range, x: Array, caches: list[Any], below: Any, shapes: Any) -> Any:
        """Nothing runs but what fills the caches."""
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if self.policy.fill == "copy":
            return x, [_each(push_newest, cache, below) for cache in caches], nothing
        filled = [
            self.net.block(index, x, self.positions, self.mask, cache)[1]
            for index, cache in zip(span, caches, strict=True)
        ]  # the compiler drops what only the output needs
        return x, filled, nothing


def _each(fn: Any, cache: Any, source: Any) -> Any:
    """``fn`` on the key/value caches of two blocks."""
    return jax.tree.map(fn, cache, source, is_leaf=lambda node: isinstance(node, KVCache))


def _total(counts: list[Count]) -> Count:
    return Count(sum(c.needed for c in counts), sum(c.executed for c in counts))
