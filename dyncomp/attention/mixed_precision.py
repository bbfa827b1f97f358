"""A cache that keeps important tokens at more bits than the others (ZipVL, arXiv 2410.08584, section 3.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.attention.asked import Asked, Work, dense_pairs, in_chunks
from dyncomp.attention.cache import CacheState
from dyncomp.attention.importance import Split, key_mass
from dyncomp.attention.important import ImportantTokens, important_attention
from dyncomp.attention.selection import covering, gathered_first, split_by
from dyncomp.attention.two_ended import Stored, TwoEnded
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Factory, Float, Int, check_factory
from dyncomp_kernels.decode_attention.packed import packed_attention
from dyncomp_kernels.decode_attention.packing import Packed
from dyncomp_kernels.sparse_attention.api import merged

PIECE = 32
"""Most new tokens of a later pass that are read at once."""


@struct.dataclass
class MixedCache(CacheState):
    """What `MixedPrecision` keeps; scanned layers stack it along a leading axis.

    Attributes:
      prompt: the first pass.
      spans: as many tokens as a window holds, span by span, leaves [b x ...]; None where there is room for none.
      keys, values: [b g m p], the newest tokens at full precision, keys rotated.
      positions: int32 [b m], their places; -1 where empty or padding.
      fresh, used: int32 [], slots of the window and spans in use.
      tau: float32 [], share of attention mass that important tokens cover; a run-time value to replace.
      budget: int32 [b], important tokens of the prompt where at least 0, else ``tau`` tells; to replace.
      length, policy: see `CacheState`.
      begun: whether a pass was read (static, as the first one is another program).
    """

    prompt: Stored
    spans: Any
    keys: Any
    values: Any
    positions: Any
    fresh: Any
    used: Any
    tau: Any
    budget: Any
    length: Any
    policy: Any = struct.field(pytree_node=False)
    begun: bool = struct.field(pytree_node=False, default=False)

    def seen(self) -> Int[Array, "b"]:
        """How many real tokens each sequence holds."""
        count = lambda x: jnp.sum(x >= 0, axis=tuple(range(1, x.ndim)), dtype=jnp.int32)
        total = count(self.prompt.positions) + count(self.positions)
        return total if self.spans is None else total + count(self.spans.positions)


@dataclasses.dataclass(frozen=True)
class MixedPrecision:
    """Important tokens at ``high`` bits, all others at ``low``, the newest as they are.

    The first pass of several positions is the prompt: it is split into important tokens T and others U, and quantised,
    each group by itself; with ``sparse`` its attention runs among T only, the same T. Later tokens wait in a window at
    full precision. Once it is full, its oldest ``span`` tokens are split by the attention of the newest query over
    them, with a share ``tau`` of that attention covered, and quantised for good. A later pass of several positions goes
    by pieces of at most `PIECE`; a window that fills up in a piece is compressed after it. Queries see everything.

    Attributes:
      max_length: tokens in all.
      tokens: factory of an `ImportantTokens`: which tokens are important. Its ``most`` caps T, and so the bytes of a
        prompt; of more important tokens the best stay in T.
      sparse: the prompt's attention is that of `important_attention`; else the mixer's own, whatever its pattern is.
      high, low: bits, 1 to 8; None for the numbers themselves.
      span: tokens that are compressed at once (the paper's window).
      prompt: most positions of the first pass, padding included. What remains of ``max_length`` is room for later ones.
        None makes room for either to take all.
    """

    max_length: int
    tokens: Factory = ImportantTokens
    sparse: bool = True
    high: int | None = 4
    low: int | None = 2
    span: int = 100
    prompt: int | None = None

    def __post_init__(self):
        check_factory(self.tokens, "MixedPrecision.tokens")
        prompt = self.max_length if self.prompt is None else self.prompt
        if not 1 <= prompt <= self.max_length or self.span < 1:
            raise DyncompError(
                f"MixedPrecision: prompt={self.prompt} of max_length={self.max_length}, span={self.span};"
                " use 1 or more, and a prompt that fits"
            )
        for name in ("high", "low"):
            if getattr(self, name) not in (None, *range(1, 9)):
                raise DyncompError(
                    f"MixedPrecision.{name}={getattr(self, name)}: use 1 to 8 bits, or None"
                )

    def stores(self, dtype: str) -> tuple[TwoEnded, TwoEnded]:
        """Layouts of the prompt and of a span."""
        slots = self.max_length if self.prompt is None else self.prompt
        bits = self.high, self.low, dtype
        return (
            TwoEnded(slots, self.tokens().cap(slots), *bits),
            TwoEnded(self.span, self.span, *bits),
        )

    @property
    def room(self) -> int:
        """Spans that can be kept."""
        return (self.max_length - (self.prompt or 0)) // self.span

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> MixedCache:
        """An empty cache for ``batch`` sequences.

        Raises:
          DyncompError: rows of the head's width fill no whole bytes at these bits.
        """
        prompt, newer = self.stores(dtype)
        shape = (batch, kv_heads, self.span - 1 + self.piece, head_dim)
        zeros, places = jnp.zeros(shape, dtype), jnp.full((batch, shape[2]), -1, jnp.int32)
        try:
            store, one = (x.empty(batch, kv_heads, head_dim) for x in (prompt, newer))
        except ValueError as error:
            raise DyncompError(f"MixedPrecision with head_dim={head_dim}: {error}") from None
        spans = (
            jax.tree.map(lambda x: jnp.stack([x] * self.room, axis=1), one) if self.room else None
        )
        tau, none = jnp.float32(self.tokens().tau), jnp.full((batch,), -1, jnp.int32)
        start = jnp.int32(0), jnp.int32(0), tau, none, jnp.int32(0)
        return MixedCache(store, spans, zeros, jnp.zeros(shape, dtype), places, *start, self)

    def attend(
        self, cache: MixedCache, asked: Asked
    ) -> tuple[MixedCache, Float[Array, "b t h p"], Work]:
        """A prompt into an empty cache; any later tokens over all that is kept.

        Raises:
          DyncompError: a window or a tree of the mixer, or more positions than a prompt may have.
        """
        asked.check_plain(self)
        if cache.begun or asked.q.shape[1] == 1:
            return self._pieces(dataclasses.replace(cache, begun=True), asked)
        self._check_fits(asked.q.shape[1])
        return self._prompt(cache, asked)

    def _check_fits(self, t: int) -> None:
        if t > self.max_length:
            raise DyncompError(
                f"{t} tokens do not fit a cache of {self.max_length}; raise max_length or cut the prompt"
            )
        if self.prompt is not None and t > self.prompt:
            raise DyncompError(
                f"{t} positions at once, but MixedPrecision.prompt={self.prompt}; raise it, or read in parts"
            )

    @property
    def piece(self) -> int:
        """Positions of a later pass that are read at once: no more than one span fills up in between."""
        return min(PIECE, self.span)

    def _pieces(self, cache: MixedCache, asked: Asked) -> tuple[MixedCache, Array, Work]:
        """A later pass; a last piece that is not full is one by itself, as padding would fill the window."""
        t = asked.q.shape[1]
        whole = t // self.piece * self.piece
        if whole in (0, t):
            return in_chunks(asked, self.piece, cache, self._piece)
        cache, first, one = in_chunks(_part(asked, 0, whole), self.piece, cache, self._piece)
        cache, rest, two = self._piece(cache, _part(asked, whole, t))
        total = (getattr(one, name) + getattr(two, name) for name in ("pairs", "needed", "scored"))
        return cache, jnp.concatenate([first, rest], axis=1), Work(*total)

    def _prompt(self, cache: MixedCache, asked: Asked) -> tuple[MixedCache, Array, Work]:
        """The first pass."""
        (q, k), places = asked.turned(), asked.own_place()
        chosen = self.tokens().choose(
            q, k, jnp.arange(q.shape[1], dtype=jnp.int32), asked.mask, cache.tau, cache.budget
        )
        layout = self.stores(cache.keys.dtype.name)[0]
        if self.sparse:
            tile = self.tokens().tile
            mixed, pairs = important_attention(q, k, asked.v, chosen, 0, layout.most, tile)
            needed = chosen.count * (chosen.count + 1) // 2
        else:
            mixed, pairs = asked.mix(q, k, asked.v, places)
            needed = dense_pairs(asked, jnp.zeros((q.shape[0],), jnp.int32))
        cache = self.packed(cache, k, asked.v, places, chosen)
        return cache, mixed, Work(pairs, needed, jnp.int32(chosen.probes * q.shape[1]))

    def packed(
        self,
        cache: MixedCache,
        k: Float[Array, "b t g p"],
        v: Float[Array, "b t g p"],
        places: Int[Array, "b t"],
        chosen: Split,
    ) -> MixedCache:
        """An empty cache with a prompt.

        Args:
          k: rotated.
          places: -1 for padding.
        """
        layout = self.stores(cache.keys.dtype.name)[0]
        count = jnp.minimum(chosen.count, layout.most)
        store = layout.pack(k, v, places, chosen.order, count)
        length = cache.length + places.shape[1]
        return dataclasses.replace(cache, prompt=store, length=length, begun=True)

    def repacked(
        self,
        cache: MixedCache,
        order: Int[Array, "b n"] | None = None,
        count: Int[Array, "b"] | None = None,
    ) -> MixedCache:
        """A prompt that was stored with ``high`` and ``low`` None, at the bits of this policy; nothing behind it.

        Args:
          order, count: other tokens for the front, by their places (`Split.order`); default, the same ones.
        """
        layout = cache.policy.stores(cache.keys.dtype.name)[0]
        (*front, first, places), (*back, last, others) = layout.ends(cache.prompt)
        join = lambda x, y: jnp.concatenate([x, y[:, ::-1]], axis=1)
        slots = lambda x: jnp.swapaxes(x.codes, 1, 2)
        k, v = (join(slots(x), slots(y)) for x, y in zip(front, back, strict=True))
        there, places = join(first, last), join(places, others)
        now = gathered_first(there, ~there)
        if order is not None:
            at = jnp.argsort(jnp.where(there, places, places.shape[1]), axis=1)
            now = jnp.take_along_axis(at, order, axis=1).astype(jnp.int32)
        b, g, _, p = cache.keys.shape
        count = cache.prompt.count if count is None else count
        own = self.stores(cache.keys.dtype.name)[0]
        store = own.pack(k, v, places, now, jnp.minimum(count, own.most))
        empty = self.init(b, g, p, cache.keys.dtype.name)
        told = {"tau": cache.tau, "budget": cache.budget, "length": cache.length, "begun": True}
        return dataclasses.replace(empty, prompt=store, **told)

    def _piece(self, cache: MixedCache, asked: Asked) -> tuple[MixedCache, Array, Work]:
        """At most `PIECE` positions, over everything."""
        (q, k), seen = asked.turned(), cache.seen()
        cache = self._appended(cache, k, asked.v, asked.own_place())
        own = (cache.positions[:, None] <= asked.place[None, :, None]) & (cache.positions >= 0)[
            :, None
        ]
        parts = [packed_attention(q, Packed.plain(cache.keys), Packed.plain(cache.values), own)]
        layout, newer = self.stores(cache.keys.dtype.name)
        part, read = layout.attend(cache.prompt, q)
        parts.append(part)
        if cache.spans is not None:
            part, more = _over_spans(newer, cache, q)
            parts.append(part)
            read = read + more
        mixed, _ = merged(parts)
        pairs = q.shape[1] * (read + cache.keys.shape[2])
        cache, scored = self._compressed(cache, q, asked.mask)
        return cache, mixed, Work(pairs, dense_pairs(asked, seen), scored)

    def _appended(self, cache: MixedCache, k: Array, v: Array, places: Array) -> MixedCache:
        """With new tokens in the window; where there is no room their keys are NaN."""
        new = k.shape[1]
        fits = (cache.fresh + new <= cache.keys.shape[2]) & (cache.length + new <= self.max_length)
        k = jnp.where(fits, k.astype(cache.keys.dtype), jnp.asarray(jnp.nan, cache.keys.dtype))
        put = lambda x, new, axis: lax.dynamic_update_slice_in_dim(
            x, new.astype(x.dtype), cache.fresh, axis
        )
        return dataclasses.replace(
            cache,
            keys=put(cache.keys, jnp.swapaxes(k, 1, 2), 2),
            values=put(cache.values, jnp.swapaxes(v, 1, 2), 2),
            positions=put(cache.positions, places, 1),
            fresh=jnp.minimum(cache.fresh + new, cache.keys.shape[2]),
            length=cache.length + new,
        )

    def _compressed(
        self, cache: MixedCache, q: Array, real: Bool[Array, "b t"]
    ) -> tuple[MixedCache, Int[Array, ""]]:
        """The oldest tokens of a full window as a span, and the keys that were scored for it."""
        if cache.spans is None:
            return cache, jnp.int32(0)
        full = (cache.fresh >= self.span) & (cache.used < self.room)
        last = real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
        query = jnp.take_along_axis(q, last[:, None, None, None], axis=1)
        done = lax.cond(full, lambda: self._one_span(cache, query), lambda: cache)
        return done, jnp.where(full, jnp.int32(self.span), 0)

    def _one_span(self, cache: MixedCache, query: Float[Array, "b 1 h p"]) -> MixedCache:
        w = self.span
        old = lambda x: jnp.swapaxes(x[:, :, :w], 1, 2)  # [b w g p]
        k, v, places = old(cache.keys), old(cache.values), cache.positions[:, :w]
        real = places >= 0
        mass = key_mass(query, k, jnp.full((k.shape[0], 1), w, jnp.int32), real)
        # The only query sees every one of them, so mass is normalised attention, and adds up to 1.
        count = jnp.minimum(
            covering(mass, cache.tau, jnp.ones(mass.shape[0])), jnp.sum(real, axis=1)
        )
        order = split_by(mass, count, real)
        span = self.stores(cache.keys.dtype.name)[1].pack(
            k, v, places, order, count.astype(jnp.int32)
        )
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new, cache.used, 1)
        shift = lambda x, axis, fill: jnp.concatenate(
            [
                lax.slice_in_dim(x, w, None, axis=axis),
                jnp.full_like(lax.slice_in_dim(x, 0, w, axis=axis), fill),
            ],
            axis,
        )
        return dataclasses.replace(
            cache,
            spans=jax.tree.map(put, cache.spans, span),
            keys=shift(cache.keys, 2, 0),
            values=shift(cache.values, 2, 0),
            positions=shift(cache.positions, 1, -1),
            fresh=cache.fresh - w,
            used=cache.used + 1,
        )

    def truncate(self, cache: MixedCache, length: Int[Array, ""] | Int[Array, "b"]) -> MixedCache:
        """Window slots are written again; what is compressed already is only hidden."""
        limit = jnp.reshape(length, (-1, 1))
        hide = lambda x: jnp.where(x < limit.reshape(-1, *[1] * (x.ndim - 1)), x, -1)
        kept = jnp.max(length)
        spans = cache.spans
        return dataclasses.replace(
            cache,
            prompt=dataclasses.replace(cache.prompt, positions=hide(cache.prompt.positions)),
            spans=spans
            if spans is None
            else dataclasses.replace(spans, positions=hide(spans.positions)),
            positions=hide(cache.positions),
            fresh=jnp.maximum(cache.fresh - jnp.maximum(cache.length - kept, 0), 0),
            length=jnp.minimum(cache.length, kept),
        )


def _part(asked: Asked, begin: int, end: int) -> Asked:
    """Some of the positions."""
    cut = {name: getattr(asked, name)[:, begin:end] for name in ("q", "k", "v", "positions")}
    return dataclasses.replace(
        asked, **cut, place=asked.place[begin:end], real=asked.mask[:, begin:end]
    )


def _over_spans(
    layout: TwoEnded, cache: MixedCache, q: Array
) -> tuple[tuple[Array, Array], Int[Array, ""]]:
    """Attention over the spans in use."""
    (b, t, h, _), used = q.shape, cache.used
    blank = jnp.zeros_like(q), jnp.full((b, t, h), -jnp.inf, jnp.float32)

    def add(index: Array, state: Any) -> Any:
        own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 1, False), cache.spans)
        part, read = layout.attend(own, q)
        return merged([state[0], part]), state[1] + read

    return lax.fori_loop(0, used, add, (blank, jnp.int32(0)))
