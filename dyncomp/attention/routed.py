"""Routing attention on the mixer seam: tokens attend within clusters of similar queries."""

import functools
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.attention.attention import PAIR_BLOCK, pair_events
from dyncomp.attention.cache import FullCache, KVCache
from dyncomp.attention.clusters import (
    ClusterPlan,
    attend_best,
    attend_nearest,
    best_members,
    newest_members,
)
from dyncomp.attention.kmeans import KMeans, standardised
from dyncomp.attention.local import heads_apart
from dyncomp.core.aux import Aux, Count, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp_kernels.dense_matmul.api import dense_matmul

Membership = Literal["nearest", "best"]


class RoutedAttention(nn.Module):
    """Attention within clusters, on shared queries and keys (Routing Transformer, arXiv 2003.05997).

    Queries are keys: a projection, standardised over each head, so that a token's logit with itself is p; logits are
    not scaled. Distance is the rank within the cluster, by learned embeddings added to keys and values.

    ``membership="nearest"`` (ours) is strictly causal: a token belongs to its nearest cluster and reads the last
    ``members`` tokens of it up to itself. ``"best"`` is the published one: each cluster takes its ``members`` best
    tokens of the *whole* sequence, of which a token may join none or several. **It leaks**: what a token reads depends
    on later tokens, even under the causal mask. It cannot decode.

    Events: ``projections`` and ``assigned`` (tokens: three products with matrices; scores of clusters), ``pair_blocks``
    and ``pairs`` (of one head), ``relative`` (queries of one head that meet the embeddings), ``searched`` (cluster
    numbers sorted, ranked or looked through; bytes only).

    Losses: the assigner's, and two figures to watch: ``coverage``, the share of heads and tokens some cluster took,
    and ``largest``, the share of the cluster that is nearest to most tokens (mean over heads).

    Attributes:
      heads: h.
      clusters: c.
      members: w, tokens of a cluster that are read, or that it takes.
      membership: see above.
      causal: no token reads a later one; False only with "best".
      assign: factory of the assigner (`KMeans`, `RandomClusters`, `AngularHash`), called with heads and clusters.
      relative: largest rank distance with an embedding of its own; 0 for no embeddings.
      eps: added to the number of a token's clusters before its mean is taken ("best" only; 0.01 as released).
      head_dim: p; None means d / h.
      cache: factory of a cache policy, called with ``max_length``. The cluster's number is kept as one more number of
        the key, so every policy that moves whole keys will do.
    """

    heads: int
    clusters: int
    members: int
    membership: Membership = "nearest"
    causal: bool = True
    assign: Factory = KMeans
    relative: int = 513
    eps: float = 0.01
    head_dim: int | None = None
    cache: Factory = FullCache
    dtypes: DTypes = DTypes()

    def width(self, d_model: int) -> int:
        """p for a model width.

        Raises:
          DyncompError: options that do not fit together.
        """
        if self.membership not in ("nearest", "best"):
            raise DyncompError(
                f"RoutedAttention.membership={self.membership!r}: use 'nearest' or 'best'"
            )
        if not self.causal and self.membership == "nearest":
            raise DyncompError(
                "RoutedAttention: membership='nearest' is causal; use 'best' with causal=False"
            )
        if min(self.heads, self.clusters, self.members) < 1 or self.relative < 0:
            raise DyncompError(
                f"RoutedAttention: heads={self.heads}, clusters={self.clusters}, members={self.members},"
                f" relative={self.relative}; use at least 1, 1, 1 and 0"
            )
        if not self.causal and self.relative:
            raise DyncompError(
                "RoutedAttention: relative embeddings count members behind a token; set relative=0 with causal=False"
            )
        if self.head_dim is None and d_model % self.heads:
            raise DyncompError(
                f"RoutedAttention: d_model={d_model} is not a multiple of heads={self.heads}; set head_dim"
            )
        return self.head_dim or d_model // self.heads

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: KVCache | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        visible: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Mixes positions.

        Args:
          positions: not used: order and rank are those of x.
          mask: [b t], 1 (or True) for real tokens; padding joins no cluster and moves no centroid.
          cache: keys and values of earlier positions; the extended one is in ``Aux.cache``. Several new positions at
            once run the whole pass over all slots, one new position reads ``members`` slots.
          capture: "plan" for a `ClusterPlan`.

        Raises:
          DyncompError: a cache with membership="best", or ``visible``.
        """
        del positions
        if visible is not None:
            raise DyncompError("RoutedAttention has no use for visible=...: it cannot verify trees")
        p = self.width(x.shape[-1])
        real = None if mask is None else mask.astype(bool)
        q, v = (self._project(x, name, p) for name in ("q", "v"))
        q = standardised(q)
        start = jnp.int32(0) if cache is None else cache.length
        place = start + jnp.arange(x.shape[1], dtype=jnp.int32)
        scores, losses = self._assigner()(q, place, real, train)
        scores = lax.stop_gradient(scores)
        nearest = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        tables = self._tables(p)
        rows = searched = x.shape[1]  # of a head: queries that run, numbers of clusters looked at
        joined = jnp.ones_like(nearest)
        if cache is not None:
            self._check_decodes()
            mixed, cache, pairs = self._cached(q, v, nearest, real, cache, tables)
            searched = cache.positions.shape[1]
            rows = rows if rows == 1 else searched
        elif self.membership == "nearest":
            run = functools.partial(_nearest, w=self.members)
            given = (q, v, nearest) if real is None else (q, v, nearest, real)
            mixed, *pairs = heads_apart(run, *given, tables=tables)
        else:
            members, kept = best_members(scores, real, self.members)
            run = functools.partial(attend_best, causal=self.causal, eps=self.eps)
            mixed, joined, *pairs = heads_apart(run, q, v, members, kept, tables=tables)
            rows, searched = kept[0, 0].size, searched * self.clusters
        if real is not None:
            joined = jnp.where(real[:, None], joined, 0)
        losses = {**losses, **_figures(nearest, joined, real, self.clusters)}
        plan = {"clusters": ClusterPlan(nearest, joined)} if "plan" in capture else {}
        events = self._events(x, real, pairs, jnp.sum(joined, dtype=jnp.int32), rows, searched)
        y = self._out(mixed, x.shape[-1])
        return y, Aux(losses, events, plan, cache)

    def _assigner(self) -> Any:
        check_factory(self.assign, "RoutedAttention.assign")
        sizes = {"heads": self.heads, "clusters": self.clusters, "dtypes": self.dtypes}
        return self.assign(name="assign", **sizes)

    def _cached(self, q, v, nearest, real, cache, tables):
        """Mixed values of new tokens behind what the cache holds; the number of a cluster is the key's last entry."""
        if self.clusters > 256 and cache.keys.dtype.itemsize < 4:
            raise DyncompError(
                f"RoutedAttention: a 16-bit cache tells 256 clusters apart, not {self.clusters}; compute in float32"
            )
        start, t = cache.length, q.shape[2]
        number = nearest[..., None].astype(q.dtype)
        slots = lambda y: jnp.swapaxes(y, 1, 2)
        wide = jnp.concatenate([q, number], axis=-1)
        values = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)))
        cache, keys, values, place = cache.policy.extend(cache, slots(wide), slots(values), real)
        keys, values = slots(keys).astype(q.dtype), slots(values)[..., :-1].astype(v.dtype)
        clusters = jnp.round(keys[..., -1].astype(jnp.float32)).astype(jnp.int32)
        keys, w = keys[..., :-1], self.members
        if t == 1:
            own = (clusters == nearest) & (place <= start)[:, None]
            member = jnp.where(own, place[:, None], -1)
            if real is not None:
                member = jnp.where(real[:, None], member, -1)
            mixed, *pairs = newest_members(q, keys, values, member, w, tables)
            return mixed, cache, pairs
        mixed, *pairs = attend_nearest(keys, values, clusters, place >= 0, w, tables)
        return lax.dynamic_slice_in_dim(mixed, start, t, axis=2), cache, pairs

    def _tables(self, p: int) -> tuple[Array, Array] | None:
        """Embeddings of rank distances for keys and for values."""
        if not self.relative:
            return None
        rows, small = min(self.relative, self.members), nn.initializers.normal(0.02)
        shape, axes = (self.heads, rows, p), ("heads", None, "head_dim")
        make = lambda name: param(self, name, small, shape, axes, self.dtypes.param)
        return make("relative_keys"), make("relative_values")

    def _project(self, x: Array, name: str, p: int) -> Float[Array, "b h t p"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        shape = (x.shape[-1], self.heads, p)
        kernel = param(self, name, init, shape, ("embed", "heads", "head_dim"), self.dtypes.param)
        y = dense_matmul(x, kernel.astype(x.dtype))
        return constrain(jnp.swapaxes(y, 1, 2), ("batch", "heads", "seq", None))

    def _out(self, mixed: Float[Array, "b h t p"], d: int) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        shape = (self.heads, mixed.shape[-1], d)
        kernel = param(self, "out", init, shape, ("heads", "head_dim", "embed"), self.dtypes.param)
        mixed = constrain(jnp.swapaxes(mixed, 1, 2), ("batch", "seq", "heads", None))
        return dense_matmul(mixed, kernel.astype(mixed.dtype), axes=2)

    def _events(
        self, x: Array, real: Array | None, pairs: Any, asked: Array, rows: int, searched: int
    ) -> dict[str, Count]:
        b, t = x.shape[:2]
        tokens = count(b * t if real is None else jnp.sum(real, dtype=jnp.int32), b * t)
        return {
            "projections": tokens,
            "assigned": tokens,
            "relative": count(asked, b * self.heads * rows),
            "searched": count(b * self.heads * searched),
            **pair_events(*pairs),
        }

    def cost(self, d_model: int, length: int) -> dict[str, Cost]:
        """Prices of a token's projections and scores; of a pair, a query and a cluster number of one head."""
        del length
        h, p, item = self.heads, self.width(d_model), self.dtypes.compute_itemsize
        words = {"parent": None, "heads": h, "clusters": self.clusters, "dtypes": self.dtypes}
        scores = self.assign(**words).cost(p)
        return {
            "projections": Cost(6 * d_model * h * p, (2 * d_model + 3 * h * p) * item),
            "assigned": scores,
            "relative": Cost(4 * p * self.members if self.relative else 0),
            "searched": Cost(0, 4),
            "pair_blocks": Cost(4 * p) * PAIR_BLOCK,
            "pairs": Cost(4 * p),
        }

    def init_cache(self, d_model: int, batch: int, max_length: int) -> Any:
        """An empty cache of this layer, in the compute dtype, with room for each key's cluster.

        Raises:
          DyncompError: membership="best" chooses by looking at the whole sequence.
        """
        self._check_decodes()
        check_factory(self.cache, "RoutedAttention.cache")
        width = self.width(d_model) + 1
        return self.cache(max_length=max_length).init(batch, self.heads, width, self.dtypes.compute)

    def _check_decodes(self) -> None:
        if self.membership == "best":
            raise DyncompError(
                "RoutedAttention: membership='best' chooses by the whole sequence, so it cannot decode;"
                " use membership='nearest'"
            )


def _nearest(q, v, nearest, real=None, *, w, tables):
    return attend_nearest(q, v, nearest, real, w, tables)


def _figures(nearest: Array, joined: Array, real: Array | None, clusters: int) -> dict[str, Array]:
    """Share of (head, token) that some cluster took, and share of the fullest cluster."""
    there = jnp.ones_like(joined) if real is None else real[:, None].astype(jnp.int32)
    there = jnp.broadcast_to(there, joined.shape).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(there), 1.0)
    each = jnp.arange(clusters, dtype=jnp.int32)
    hits = (nearest[..., None] == each).astype(jnp.float32) * there[..., None]
    load = jnp.sum(hits, axis=(0, 2))
    return {
        "coverage": jnp.sum((joined > 0).astype(jnp.float32)) / total,
        "largest": jnp.mean(jnp.max(load, axis=-1) / jnp.maximum(jnp.sum(load, axis=-1), 1.0)),
    }
