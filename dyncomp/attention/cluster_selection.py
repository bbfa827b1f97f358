"""A cache that drops what a prompt's end never looked at, and lets each step read few clusters of the rest.

MPCache (arXiv 2501.06807): static look-once eviction, then a query-aware choice of clusters by a score that is linear
in the query, coarse clusters first, shared between neighbouring layers. Nothing is trained.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import lax

from dyncomp.attention import boxes
from dyncomp.attention.asked import Asked, Work, dense_pairs, in_chunks, pick
from dyncomp.attention.choose_clusters import chosen_clusters
from dyncomp.attention.cluster_cache import (
    ClusterBudgets,
    ClusterCache,
    appended,
    boxed,
    compacted,
)
from dyncomp.attention.look_once import looked_at, most_looked_at
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels.decode_attention.api import decode_attention


@dataclasses.dataclass(frozen=True)
class ClusterSelection:
    """Clusters of consecutive kept tokens, chosen anew for every query and key/value head.

    The first pass reads the prompt densely, then keeps the share of it that its last queries look at, the same tokens
    for all heads of a layer. A later position reads the clusters with the best scores, and always the first and the
    last one, which holds itself. The query heads of a key/value head share a list: their scores are added up. Rows may
    be padded on either side and differ in length: only real tokens take slots. Longer passes behind the first read
    position by position.

    Attributes:
      max_length: places; without eviction also the slots.
      slots: of the cache, where eviction makes fewer do; None for ``max_length``. Beyond them keys are NaN.
      cluster: tokens of a cluster.
      coarse: tokens of a coarse cluster, a multiple of ``cluster``; None scores all clusters.
      score: see `boxes.scores_of`.
      alpha: weight of the greatest coordinates for "linear".
      kept: share of the prompt that stays.
      look: share of its queries, the last ones, that decide about that.
      share: share of all clusters that are read, the forced ones come on top.
      coarse_share: share of coarse clusters whose children are scored, the forced ones come on top.
      last: "always" forces the last clusters; "partial", the released code's rule, only while the last coarse one (the
        last one without coarse ones) is not full, so that at multiples the newest token may be hidden from itself.
      share_group: so many neighbouring layers keep the same tokens and read the same clusters; single new positions
        only, others choose for themselves. How layers that evict different tokens share clusters the paper leaves
        open; here they evict the same.
      share_from: so many first layers choose for themselves.
    """

    max_length: int
    slots: int | None = None
    cluster: int = 16
    coarse: int | None = 32
    score: boxes.Score = "linear"
    alpha: float = 0.6
    kept: float = 0.75
    look: float = 0.2
    share: float = 0.2
    coarse_share: float = 0.5
    last: Literal["always", "partial"] = "always"
    share_group: int = 1
    share_from: int = 2

    def __post_init__(self):
        shares = self.kept, self.look, self.share, self.coarse_share
        if not all(0 < share <= 1 for share in shares) or not 0 <= self.alpha <= 1:
            raise DyncompError(
                f"ClusterSelection: kept={self.kept}, look={self.look}, share={self.share},"
                f" coarse_share={self.coarse_share}, alpha={self.alpha}; use shares in (0, 1] and alpha in [0, 1]"
            )
        if min(self.max_length, self.cluster, self.held, self.share_group) < 1:
            raise DyncompError(
                f"ClusterSelection: max_length={self.max_length}, slots={self.slots}, cluster={self.cluster},"
                f" share_group={self.share_group}; use at least 1"
            )
        if self.coarse is not None and (self.coarse % self.cluster or self.coarse <= self.cluster):
            raise DyncompError(
                f"ClusterSelection: coarse={self.coarse}; use a multiple of cluster={self.cluster}, or None"
            )
        if self.score not in get_args(boxes.Score) or self.last not in ("always", "partial"):
            raise DyncompError(
                f"ClusterSelection: score={self.score!r}, last={self.last!r}; use one of"
                f" {', '.join(get_args(boxes.Score))}, and 'always' or 'partial'"
            )

    @property
    def held(self) -> int:
        """Slots of the cache."""
        return self.max_length if self.slots is None else min(self.slots, self.max_length)

    @property
    def longest(self) -> int:
        """Clusters of a list at most."""
        return _longest(self.share, -(-self.held // self.cluster))

    def weight(self, cache: ClusterCache) -> Array | None:
        """How centres are made (`boxes.boxes_of`)."""
        return None if self.score == "mean" else cache.budgets.alpha

    def init(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        heads: int | None = None,
    ) -> ClusterCache:
        """An empty cache for ``batch`` sequences."""
        s, lists = self.held, (batch, kv_heads, self.longest)
        blank = lambda size: boxes.blank(batch, -(-s // size), kv_heads, head_dim, dtype)
        share = jnp.float32
        budgets = ClusterBudgets(
            kept=share(self.kept),
            coarse=share(self.coarse_share),
            share=share(self.share),
            clusters=jnp.int32(self.longest),
            alpha=share(self.alpha),
        )
        return ClusterCache(
            keys=jnp.zeros((batch, s, kv_heads, head_dim), dtype),
            values=jnp.zeros((batch, s, kv_heads, head_dim), dtype),
            positions=jnp.full((batch, s), -1, jnp.int32),
            looked=jnp.zeros((batch, s), jnp.float32),
            count=jnp.zeros((batch,), jnp.int32),
            length=jnp.int32(0),
            fine=blank(self.cluster),
            coarse=None if self.coarse is None else blank(self.coarse),
            clusters=jnp.zeros(lists, jnp.int32),
            read=jnp.zeros(lists, bool),
            layer=jnp.int32(0),
            budgets=budgets,
            policy=self,
        )

    def truncate(
        self, cache: ClusterCache, length: Int[Array, ""] | Int[Array, "b"]
    ) -> ClusterCache:
        """Without the places from ``length`` on; what they displaced, a prompt's evicted tokens, does not come back."""
        stay = (cache.positions >= 0) & (cache.positions < jnp.reshape(length, (-1, 1)))
        lost = jnp.any(jnp.sum(stay, axis=1, dtype=jnp.int32) < cache.count)
        cache = lax.cond(lost, lambda c: compacted(c, stay), lambda c: c, cache)
        return dataclasses.replace(cache, length=jnp.max(length))

    def attend(
        self, cache: ClusterCache, asked: Asked
    ) -> tuple[ClusterCache, Float[Array, "b t h p"], Work]:
        """The first pass of several positions densely, then position by position.

        Raises:
          DyncompError: the mixer is not plainly causal, or layers share and nothing is handed up to them.
        """
        asked.check_plain(self)
        if self.share_group > 1:
            if asked.below is None:
                raise DyncompError(
                    "ClusterSelection.share_group goes with the whole stack of blocks; run it, or use share_group=1"
                )
            cache = dataclasses.replace(cache, layer=asked.below["kept_layer"])
        if asked.q.shape[1] == 1:
            return self._step(cache, asked, self._follows(cache))
        step = lambda cache, piece: self._step(cache, piece, jnp.zeros((), bool))
        first = lambda cache: _bare(*self._first(cache, asked))
        later = lambda cache: _bare(*in_chunks(asked, 1, cache, step))
        cache, mixed, work = lax.cond(cache.length == 0, first, later, cache)
        return cache, mixed, Work(*work)

    def _follows(self, cache: ClusterCache) -> Bool[Array, ""]:
        """Whether this layer does as the one below."""
        above = cache.layer - self.share_from
        return (above >= 0) & (above % self.share_group != 0)

    def _first(self, cache: ClusterCache, asked: Asked) -> tuple[ClusterCache, Array, Work]:
        """The prompt: dense attention within the pass, then only what is kept goes into the cache."""
        q, k = asked.turned()
        own, (b, t) = asked.own_place(), asked.q.shape[:2]
        mixed, pairs = asked.mix(q, k, asked.v, own)
        stay, looked, scored = self._staying(cache, asked, q, k)
        order = jnp.argsort(~stay, axis=1, stable=True)[:, : self.held].astype(jnp.int32)
        order = jnp.pad(order, ((0, 0), (0, max(self.held - t, 0))))
        count = jnp.sum(stay, axis=1, dtype=jnp.int32)
        used = jnp.arange(self.held, dtype=jnp.int32)[None] < count[:, None]
        fits = jnp.where((count <= self.held)[:, None], jnp.float32(1), jnp.float32(jnp.nan))
        blank = lambda x: jnp.where(used.reshape(*used.shape, *[1] * (x.ndim - 2)), x, 0)
        cache = dataclasses.replace(
            cache,
            keys=blank(pick(k * fits[:, :, None, None].astype(k.dtype), order)).astype(
                cache.keys.dtype
            ),
            values=blank(pick(asked.v, order)).astype(cache.values.dtype),
            positions=jnp.where(used, pick(own, order), -1),
            looked=blank(pick(looked, order)),
            count=jnp.minimum(count, self.held),
            length=cache.length + t,
        )
        needed = dense_pairs(asked, jnp.zeros((b,), jnp.int32))
        return boxed(cache), mixed, Work(pairs, needed, scored)

    def _staying(
        self, cache: ClusterCache, asked: Asked, q: Array, k: Array
    ) -> tuple[Bool[Array, "b t"], Float[Array, "b t"], Array]:
        """Which of the prompt's tokens are kept, how much they were looked at, and pairs scored for that."""

        def look() -> tuple[Array, Array, Array]:
            looked, scored = looked_at(q, k, asked.mask, self.look)
            stay = most_looked_at(looked, asked.mask, cache.budgets.kept)
            return stay, looked, jnp.int32(scored)

        def follow() -> tuple[Array, Array, Array]:
            assert asked.below is not None
            places, looked = asked.below["kept_positions"], asked.below["kept_looked"]
            t = asked.q.shape[1]
            at = jnp.where(places >= 0, places - asked.place[0], t)
            rows = jnp.arange(places.shape[0])[:, None]
            stay = jnp.zeros(asked.mask.shape, bool).at[rows, at].set(True, mode="drop")
            spread = jnp.zeros(stay.shape, jnp.float32).at[rows, at].set(looked, mode="drop")
            return stay, spread, jnp.int32(0)

        return look() if self.share_group == 1 else lax.cond(self._follows(cache), follow, look)

    def _step(
        self, cache: ClusterCache, asked: Asked, follows: Bool[Array, ""]
    ) -> tuple[ClusterCache, Array, Work]:
        """One position a row."""
        q, k = asked.turned()
        cache = appended(cache, k[:, 0], asked.v[:, 0], asked.own_place()[:, 0])
        clusters, read, scored = self._choice(cache, q[:, 0], asked.below, follows)
        cache = dataclasses.replace(cache, clusters=clusters, read=read)
        slots, seen = slots_of(clusters, read, cache.count, self.cluster)
        slots = jnp.minimum(slots, self.held - 1)
        keys, values = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
        mixed, _ = decode_attention(q[:, 0], keys, values, slots, seen)
        each = jnp.sum(seen, axis=(1, 2), dtype=jnp.int32)
        needed = jnp.where(asked.mask[:, 0], -(-each // seen.shape[1]), 0)
        return cache, mixed[:, None], Work(jnp.int32(slots.shape[-1]), needed, scored)

    def _choice(
        self, cache: ClusterCache, q: Float[Array, "b h p"], below: Any, follows: Bool[Array, ""]
    ) -> tuple[Int[Array, "b g m"], Bool[Array, "b g m"], Array]:
        """Clusters to read, and how many summaries (or keys) were scored for them."""
        if self.share_group == 1:
            return self.select(cache, q)
        given = lambda: (below["kept_clusters"], below["kept_read"], jnp.int32(0))
        return lax.cond(follows, given, lambda: self.select(cache, q))

    def select(
        self, cache: ClusterCache, q: Float[Array, "b h p"]
    ) -> tuple[Int[Array, "b g m"], Bool[Array, "b g m"], Int[Array, ""]]:
        """The clusters that queries with positions would read."""
        total = -(-cache.count // self.cluster)
        take = _part(cache.budgets.share, total)
        b, _, g, _ = cache.fine.high.shape
        last = self._last(cache, self.cluster)
        if self.coarse is None:
            numbers = jnp.broadcast_to(_numbers(cache.fine), (b, g, cache.fine.high.shape[1]))
            scores, scored = self._scores(q, cache.fine, cache, self.cluster)
        else:
            numbers, scores, scored = self._below_coarse(cache, q)
        there = (numbers >= 0) & (numbers < total[:, None, None])
        limit = cache.budgets.clusters
        chosen = chosen_clusters(scores, numbers, there, last, take, self.longest, limit)
        return *self._filled(*chosen), scored

    def _filled(self, index: Array, seen: Array) -> tuple[Array, Array]:
        """Lists of the full length, where there are fewer candidates than that."""
        more = ((0, 0), (0, 0), (0, self.longest - index.shape[-1]))
        return jnp.pad(index, more), jnp.pad(seen, more)

    def _below_coarse(
        self, cache: ClusterCache, q: Array
    ) -> tuple[Int[Array, "b g c"], Float[Array, "b g c"], Array]:
        """Children of the best coarse clusters (-1 where none), their scores, and how much was scored."""
        assert self.coarse is not None and cache.coarse is not None
        total = -(-cache.count // self.coarse)
        scores, first = self._scores(q, cache.coarse, cache, self.coarse)
        numbers = jnp.broadcast_to(_numbers(cache.coarse), scores.shape)
        there = numbers < total[:, None, None]
        take = _part(cache.budgets.coarse, total)
        most = _longest(self.coarse_share, scores.shape[-1])
        last = self._last(cache, self.coarse)
        index, seen = chosen_clusters(scores, numbers, there, last, take, most)
        each = self.coarse // self.cluster
        child = index[..., None] * each + jnp.arange(each, dtype=jnp.int32)
        child = jnp.where(seen[..., None], child, -1).reshape(*index.shape[:2], -1)
        at = jnp.maximum(child, 0)
        if self.score in ("best", "random"):
            every, second = self._scores(q, cache.fine, cache, self.cluster)
            return child, jnp.take_along_axis(every, at, axis=-1, mode="clip"), first + second
        own = boxes.children(cache.fine, at)
        scores, second = self._scores(q, own, cache, self.cluster)
        return child, scores, first + second

    def _scores(
        self, q: Array, own: boxes.Boxes, cache: ClusterCache, size: int
    ) -> tuple[Float[Array, "b g c"], Array]:
        """Scores, and how many keys or summaries were multiplied for them; a bound multiplies two vectors."""
        held = (cache.keys, cache.count, size) if self.score == "best" else None
        scores = boxes.scores_of(q, own, self.score, held)
        each = {"bound": 2, "random": 0}.get(self.score, 1)
        scored = self.held if self.score == "best" else each * own.high.shape[1]
        return scores, jnp.int32(scored)

    def _last(self, cache: ClusterCache, size: int) -> Int[Array, "b"]:
        """The number of the last cluster, -1 where it is not forced."""
        newest = (cache.count - 1) // size
        if self.last == "always":
            return newest
        full = cache.count % (self.coarse or self.cluster) == 0
        return jnp.where(full, -1, newest)


def slots_of(
    clusters: Int[Array, "b g m"], read: Bool[Array, "b g m"], count: Int[Array, "b"], size: int
) -> tuple[Int[Array, "b g n"], Bool[Array, "b g n"]]:
    """Slots of listed clusters, ascending where the list is, and which of them hold a token that is read."""
    slots = clusters[..., None] * size + jnp.arange(size, dtype=jnp.int32)
    seen = read[..., None] & (slots < count[:, None, None, None])
    flat = (*clusters.shape[:2], -1)
    return slots.reshape(flat), seen.reshape(flat)


def _bare(cache: ClusterCache, mixed: Array, work: Work) -> tuple[ClusterCache, Array, tuple]:
    """As a branch may return it."""
    return cache, mixed, (work.pairs, work.needed, work.scored)


def _numbers(own: boxes.Boxes) -> Int[Array, "1 1 n"]:
    return jnp.arange(own.high.shape[1], dtype=jnp.int32)[None, None]


def _part(share: Float[Array, ""], total: Int[Array, "b"]) -> Int[Array, "b"]:
    """``int(share * total)``, where 0.2 of 5 is 1."""
    return jnp.floor(share * total.astype(jnp.float32) + 1e-4).astype(jnp.int32)


def _longest(share: float, total: int) -> int:
    """The longest list of a share of ``total`` clusters and the two forced ones."""
    return min(math.floor(share * total + 1e-4) + 2, total)
