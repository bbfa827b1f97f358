"""A cache that keeps everything and lets each step read few of its tokens (TokenSelect, arXiv 2411.02886)."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.attention.asked import Asked, Work, in_chunks
from dyncomp.attention.attend import attend
from dyncomp.attention.cache import CacheState, newcomers, positions_before, write_slots
from dyncomp.attention.counts import counts_of, slots_of
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int

Vote = Literal["soft", "scaled", "raw", "random", "recent"]


@struct.dataclass
class Selecting(CacheState):
    """Everything read so far, and the last selection.

    Attributes:
      keys: [b g s p], without positions.
      values: [b g s p].
      positions: int32 [b s], places; -1 where empty or padding.
      length: int32 [].
      chosen: int32 [b m], slots of the last selection, ascending; s where there are fewer.
      query: float32 [b h p], what they were chosen by.
      since: int32 [b], real tokens there were then; -1 before the first selection.
      selections: int32 [b], how often each row chose in single steps.
      budget: int32 [], tokens to select, at most m: a run-time value, ``top`` at first.
      policy: static.
    """

    keys: Float[Array, "*l b g s p"]
    values: Float[Array, "*l b g s p"]
    positions: Int[Array, "*l b s"]
    length: Int[Array, "*l"]
    chosen: Int[Array, "*l b m"]
    query: Float[Array, "*l b h p"]
    since: Int[Array, "*l b"]
    selections: Int[Array, "*l b"]
    budget: Int[Array, "*l"]
    policy: Any = struct.field(pytree_node=False)

    def seen(self) -> Int[Array, "b"]:
        """Real tokens of each sequence."""
        return jnp.sum(self.positions >= 0, axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """First, best and newest tokens, one list for all heads of a layer.

    A query's mean over heads would let heads with large products decide, so each head votes with a softmax over the
    candidates and votes are added up. Keys are kept without positions: for the vote a query stands ``local`` places
    after every candidate, and what is read stands at consecutive places, so that no distance exceeds the list.

    Attributes:
      max_length: slots.
      sink, top, local: first, selected and newest tokens of a list.
      chunk: a longer pass is read in pieces of so many positions, which select by their mean query; at most ``local``,
        so that a piece sees itself. None reads passes of more than one position densely.
      vote: "soft" as above (no 1/sqrt(p), as the released code), "scaled" with it, "raw" adds products up; "random" and
        "recent" (the newest candidates) are controls that score nothing.
      heads: "grouped" pairs query head j with key head j // (h / g); "modulo" with j mod g, as the released kernel does
        against its own text.
      compact: consecutive places for what is read; False keeps the text's.
      reuse: a step keeps the last selection while the cosine of its query with that selection's is at least this (the
        paper's selection cache, default 0.9 in its code); None selects at every step.
      patience: steps that a selection lasts at most; the newest tokens since then are read in addition to ``local``.
    """

    max_length: int
    sink: int = 128
    top: int = 2048
    local: int = 512
    chunk: int | None = None
    vote: Vote = "soft"
    heads: Literal["grouped", "modulo"] = "grouped"
    compact: bool = True
    reuse: float | None = None
    patience: int = 32

    def __post_init__(self):
        if min(self.max_length, self.top, self.local, self.patience) < 1 or self.sink < 0:
            raise DyncompError(
                f"TokenSelection: sink={self.sink}, top={self.top}, local={self.local}, patience={self.patience}; use 1"
                " or more (sink: 0 or more)"
            )
        if self.chunk is not None and not 1 <= self.chunk <= self.local:
            raise DyncompError(
                f"TokenSelection: chunk={self.chunk} of local={self.local}; use 1 to local"
            )

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> Selecting:
        """Empty."""
        shape = (batch, kv_heads, self.max_length, head_dim)
        chosen = jnp.full((batch, min(self.top, self.max_length)), self.max_length, jnp.int32)
        query = jnp.zeros((batch, heads or kv_heads, head_dim), jnp.float32)
        none, zero = jnp.full((batch,), -1, jnp.int32), jnp.zeros((batch,), jnp.int32)
        return Selecting(
            jnp.zeros(shape, dtype),
            jnp.zeros(shape, dtype),
            jnp.full((batch, self.max_length), -1, jnp.int32),
            jnp.int32(0),
            chosen,
            query,
            none,
            zero,
            jnp.int32(chosen.shape[1]),
            self,
        )

    def truncate(self, cache: Selecting, length: Int[Array, ""] | Int[Array, "b"]) -> Selecting:
        """They are written again; a selection that knew them is void."""
        positions = positions_before(cache, length)
        cut = dataclasses.replace(cache, positions=positions, length=jnp.max(length))
        since = jnp.where(cache.since > cut.seen(), -1, cache.since)
        return dataclasses.replace(cut, since=since)

    def attend(
        self, cache: Selecting, asked: Asked
    ) -> tuple[Selecting, Float[Array, "b t h p"], Work]:
        """A step or a piece over its list, a longer pass piece by piece or densely."""
        asked.check_plain(self)
        t = asked.q.shape[1]
        cache = self._extended(cache, asked)
        if t > 1 and self.chunk is None:
            return cache, *self._densely(cache, asked)
        return in_chunks(asked, self.chunk or 1, cache, self._listed)

    def _extended(self, cache: Selecting, asked: Asked) -> Selecting:
        """With the new tokens' keys; what positions these get is decided where they are read."""
        k, place = newcomers(cache, asked.k, asked.real, self.max_length)
        at = cache.length
        return dataclasses.replace(
            cache,
            keys=write_slots(cache.keys, jnp.swapaxes(k, 1, 2), at, 2),
            values=write_slots(cache.values, jnp.swapaxes(asked.v, 1, 2), at, 2),
            positions=write_slots(cache.positions, place, at, 1),
            length=at + k.shape[1],
        )

    def _densely(self, cache: Selecting, asked: Asked) -> tuple[Array, Work]:
        q = asked.turn(asked.q, asked.positions)
        keys, values = (jnp.swapaxes(x, 1, 2).astype(q.dtype) for x in (cache.keys, cache.values))
        ranks = _ranks(cache.positions, counts_of(cache.positions >= 0))
        keys = asked.turn(keys, jnp.maximum(ranks, 0))
        mixed, pairs = asked.mix(q, keys, values, cache.positions)
        return mixed, Work(pairs, scored=jnp.int32(0))

    def _listed(self, cache: Selecting, asked: Asked) -> tuple[Selecting, Array, Work]:
        """One step or piece; of the cache it sees what is not after it."""
        t = asked.q.shape[1]
        positions = jnp.where(cache.positions <= asked.place[-1], cache.positions, -1)
        counts = counts_of(positions >= 0)
        ranks, count = _ranks(positions, counts), counts[:, -1]
        cache, scored = self._selected(cache, asked, ranks, count)
        slots, seen = self._list(cache, counts, t)
        keys, values = (_listed(x, slots) for x in (cache.keys, cache.values))
        rank = jnp.take_along_axis(ranks, slots, axis=1, mode="clip")
        own, most = _own_ranks(asked, positions), None
        if self.compact:
            most = slots.shape[1]
            end = jnp.sum(seen, axis=1, dtype=jnp.int32)[:, None]
            rank = jnp.cumsum(seen, axis=1, dtype=jnp.int32) - 1
            own = end - (count[:, None] - own)
        q = asked.turn(asked.q, jnp.maximum(own, 0))
        keys = asked.turn(keys.astype(q.dtype), jnp.maximum(rank, 0), most)
        place = jnp.take_along_axis(positions, slots, axis=1, mode="clip")
        allowed = seen[:, None] & (place[:, None] <= asked.place[None, :, None])
        mixed = attend(q, keys, values.astype(q.dtype), allowed)
        needed = jnp.sum(allowed & asked.mask[..., None], axis=(1, 2), dtype=jnp.int32)
        return cache, mixed, Work(jnp.int32(t * slots.shape[1]), needed, scored)

    def _selected(
        self, cache: Selecting, asked: Asked, ranks: Int[Array, "b s"], count: Int[Array, "b"]
    ) -> tuple[Selecting, Array]:
        """With a selection for these queries, and how many keys were scored for it."""
        query = _mean_query(asked, self.local)
        s = ranks.shape[1]

        candidates = (ranks >= self.sink) & (ranks < (count - self.local)[:, None])

        def vote(cache: Selecting) -> tuple[Array, Array]:
            scored = 0 if self.vote in ("random", "recent") else s
            return self._best(cache, query, candidates), jnp.int32(scored)

        def take(cache: Selecting) -> tuple[Array, Array]:
            return _lowest(candidates, cache.chosen.shape[1]), jnp.int32(0)

        def select(cache: Selecting) -> tuple[Array, Array]:
            fits = jnp.all(jnp.sum(candidates, axis=1) <= cache.budget)
            return lax.cond(fits, take, vote, cache)

        if self.reuse is None or asked.q.shape[1] > 1:
            chosen, scored = select(cache)
            return dataclasses.replace(cache, chosen=chosen, since=count, query=query), scored
        size = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2)))
        product = jnp.sum(query * cache.query, axis=(1, 2))
        alike = product >= self.reuse * size(query) * size(cache.query)
        stale = (cache.since < 0) | (count - cache.since >= self.patience) | ~alike
        keep = lambda cache: (cache.chosen, jnp.int32(0))
        chosen, scored = lax.cond(jnp.any(stale), select, keep, cache)
        return dataclasses.replace(
            cache,
            chosen=jnp.where(stale[:, None], chosen, cache.chosen),
            query=jnp.where(stale[:, None, None], query, cache.query),
            since=jnp.where(stale, count, cache.since),
            selections=cache.selections + stale,
        ), scored

    def _best(
        self, cache: Selecting, query: Float[Array, "b h p"], candidates: Bool[Array, "b s"]
    ) -> Int[Array, "b m"]:
        """The candidates with most votes, ascending."""
        if self.vote == "recent":
            order = jnp.arange(candidates.shape[1], dtype=jnp.float32)
            votes = jnp.broadcast_to(order, candidates.shape)
        elif self.vote == "random":
            bits = jax.lax.bitcast_convert_type(
                jnp.sum(query), jnp.uint32
            )  # another in every layer
            key = jax.random.fold_in(jax.random.key(0), bits)
            votes = jax.random.uniform(key, candidates.shape)
        else:
            votes = votes_of(query, cache.keys, candidates, self.vote, self.heads)
        votes = jnp.where(candidates, votes, -jnp.inf)
        best, index = lax.top_k(votes, cache.chosen.shape[1])
        within = (best > -jnp.inf) & (jnp.arange(index.shape[1]) < cache.budget)
        index = jnp.where(within, index.astype(jnp.int32), votes.shape[1])
        return jnp.sort(index, axis=1)

    def _list(
        self, cache: Selecting, counts: Int[Array, "b s"], t: int
    ) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
        """Slots in the order of the text, and which entries count."""
        (b, s), count = counts.shape, counts[:, -1]
        longest = self.local + (0 if self.reuse is None or t > 1 else self.patience)
        first = (
            jnp.minimum(cache.since, count)[:, None] - self.local
        )  # rank where the newest part begins
        early = jnp.broadcast_to(jnp.arange(self.sink, dtype=jnp.int32), (b, self.sink))
        late = count[:, None] - longest + jnp.arange(longest, dtype=jnp.int32)
        slot = lambda rank: slots_of(counts, rank)
        parts = [
            (slot(early), early < count[:, None]),
            (cache.chosen, cache.chosen < s),
            (slot(late), (late >= first) & (late >= self.sink)),
        ]
        slots, seen = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        return jnp.minimum(slots, s - 1), seen


def _lowest(chosen: Bool[Array, "b s"], size: int) -> Int[Array, "b m"]:
    """The slots that are True, at most ``size`` of each row, ascending; s where there are fewer."""
    s = chosen.shape[1]
    find = lambda row: jnp.nonzero(row, size=size, fill_value=s)[0].astype(jnp.int32)
    return jax.vmap(find)(chosen)


def _listed(x: Float[Array, "b g s p"], slots: Int[Array, "b n"]) -> Float[Array, "b n g p"]:
    """Some slots, token by token."""
    # `jnp.take_along_axis` is slower on XLA's CPU.
    take = lambda row, at: jnp.take(row, at, axis=1, mode="clip")
    return jnp.swapaxes(jax.vmap(take)(x, slots), 1, 2)


def votes_of(
    query: Float[Array, "b h p"],
    keys: Float[Array, "b g s p"],
    candidates: Bool[Array, "b s"],
    vote: Vote,
    heads: Literal["grouped", "modulo"] = "grouped",
) -> Float[Array, "b s"]:
    """Votes of all heads for each key, float32; of keys that are no candidates: 0, or products for ``raw``."""
    b, h, p = query.shape
    g = keys.shape[1]
    split = query.reshape(b, g, h // g, p) if heads == "grouped" else query.reshape(b, h // g, g, p)
    form = "bgrp,bgsp->bgrs" if heads == "grouped" else "brgp,bgsp->bgrs"
    scores = jnp.einsum(form, split, keys.astype(query.dtype), preferred_element_type=jnp.float32)
    if vote == "raw":
        return jnp.sum(scores, axis=(1, 2))
    scores = scores / math.sqrt(p) if vote == "scaled" else scores
    weights = jax.nn.softmax(scores, axis=-1, where=candidates[:, None, None])
    return jnp.sum(jnp.where(candidates[:, None, None], weights, 0.0), axis=(1, 2))


def _mean_query(asked: Asked, local: int) -> Float[Array, "b h p"]:
    """Mean of the real queries, standing ``local``, ``local`` + 1, ... places after all candidates; float32."""
    places = local + jnp.arange(asked.q.shape[1], dtype=jnp.int32)[None]
    q = asked.turn(asked.q, places).astype(jnp.float32)
    real = asked.mask[..., None, None].astype(jnp.float32)
    return jnp.sum(q * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)


def _ranks(positions: Int[Array, "b s"], counts: Int[Array, "b s"]) -> Int[Array, "b s"]:
    """Which real token of its row a slot holds, from 0; -1 where none."""
    return jnp.where(positions >= 0, counts - 1, -1)


def _own_ranks(asked: Asked, positions: Int[Array, "b s"]) -> Int[Array, "b t"]:
    """Ranks of the new positions themselves."""
    count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)[:, None]
    after = jnp.cumsum(asked.mask[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    return count - after
