"""Grouped-query attention on the mixer seam."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention.asked import Asked, Work
from dyncomp.attention.attend import attend, attend_seen
from dyncomp.attention.band import band_serves, banded
from dyncomp.attention.cache import CacheState, FullCache
from dyncomp.attention.fused import fused_attention, fused_serves
from dyncomp.attention.local import on_own_heads
from dyncomp.attention.ring import ring_attention
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate, rotate_below
from dyncomp.attention.sampled import Sampled
from dyncomp.attention.sight import Sight
from dyncomp.core.aux import Aux, Count, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.norms import rms_norm
from dyncomp.core.sharding import constrain, param, parts
from dyncomp.core.typing import Array, Bool, Factory, Float, Int, check_factory
from dyncomp_kernels.dense_matmul.api import dense_matmul

PAIR_BLOCK = 16_384
"""Pairs are counted as blocks of this many and a remainder, so that sums over a batch stay within int32."""

MAX_LENGTH = 46_340
"""Longest sequence whose pairs fit int32."""


def pair_events(needed: Int[Array, "b"], executed: Array | int) -> dict[str, Count]:
    """Query-key pairs of a sequence, and those computed: ``pair_blocks`` of `PAIR_BLOCK` and the rest, ``pairs``."""
    blocks, rest = needed // PAIR_BLOCK, needed % PAIR_BLOCK
    b = needed.shape[0]
    return {
        "pair_blocks": count(jnp.sum(blocks), b * (executed // PAIR_BLOCK)),
        "pairs": count(jnp.sum(rest), b * (executed % PAIR_BLOCK)),
    }


Across = Literal["ring", "gather"]


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads, optional RoPE and a pluggable cache.

    Events: ``projections`` (per token), ``pair_blocks`` and ``pairs`` (query-key pairs over all heads; causal
    attention needs the lower triangle among real tokens and executes the full square, with a cache the blocks of it
    that some query sees, or what its policy selects), and ``scored`` (keys or summaries of keys that a policy scored
    to select, over all heads).

    Attributes:
      heads: query heads h.
      kv_heads: key/value heads g, a divisor of h; None means h.
      head_dim: p; None means d / h.
      rope_theta: base of RoPE; None for no position signal.
      rope_scaling: changed frequencies for long texts.
      causal: a position sees itself and what precedes it.
      window: a position sees itself and the ``window - 1`` slots before it (Mistral); None for all. The cache still
        keeps everything. Long passes without a cache compute blocks around the band (`band`).
      bias: biases on all four projections.
      qkv_bias: biases on queries, keys and values (Qwen2); None follows ``bias``.
      qk_norm: RMS norm of every query and key head before RoPE (Qwen3).
      eps: of that norm.
      cache: factory of a cache policy, called with ``max_length``.
      pattern: factory of a sparse pattern (`attention.Pattern`) for passes of ``pattern_from`` positions and more;
        shorter ones and single tokens are dense. None for none.
      across: how positions see those on other devices where the mesh splits sequences (`MeshSpec.sequence`, or a rule
        for ``seq``), in dense passes without a cache: "ring" (`ring_attention`: keys go round, nobody holds them all)
        or "gather" (every device collects all keys and values). Patterns, samplers, caches and ``visible`` gather.
      sampler: factory of sampled attention (`attention.Sampler`): for passes with ``train=True``, and for any pass
        that is given the random stream "dropout" (self-ensembles); all others are as if there were none. Adds the
        event ``draws`` (per token).
    """

    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    rope_scaling: RopeScaling | None = None
    causal: bool = True
    window: int | None = None
    bias: bool = False
    qkv_bias: bool | None = None
    qk_norm: bool = False
    eps: float = 1e-6
    cache: Factory = FullCache
    pattern: Factory | None = None
    pattern_from: int = 2
    sampler: Factory | None = None
    across: Across = "ring"
    dtypes: DTypes = DTypes()

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(h, g, p) for a model width.

        Raises:
          DyncompError: the heads do not divide each other or the width, or an option that makes no sense.
        """
        if self.window is not None and (self.window < 1 or not self.causal):
            raise DyncompError(
                f"Attention.window={self.window}, causal={self.causal}: a window needs causal=True and 1 or more slots"
            )
        if self.across not in get_args(Across):
            raise DyncompError(f"Attention.across={self.across!r}: use 'ring' or 'gather'")
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise DyncompError(
                f"Attention: heads={self.heads} is not a multiple of kv_heads={kv_heads}"
            )
        if self.head_dim is None and d_model % self.heads:
            raise DyncompError(
                f"Attention: d_model={d_model} is not a multiple of heads={self.heads}; set head_dim"
            )
        return self.heads, kv_heads, self.head_dim or d_model // self.heads

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: CacheState | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        visible: Bool[Array, "#b t w"] | None = None,
        below: Mapping[str, Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Mixes positions.

        ``capture=("heads",)`` puts queries, keys and values, with their positions, of passes without a cache into the
        plans.

        Args:
          x: compute dtype.
          positions: what RoPE sees; default the place in the sequence. Causality follows the order of x.
          mask: [b t], 1 (or True) for real tokens; padding is never attended to.
          cache: keys and values of earlier positions; the extended one is in ``Aux.cache``.
          visible: of the newest w slots, those of x included, which each position may see, within what it sees anyway
            (w = t: a tree among the new positions; older slots are seen by all).
          below: what the policy of the layer below handed up; this one's share is in ``Aux.below``.
        """
        b, t, d = x.shape
        h, g, p = self.sizes(d)
        if t > MAX_LENGTH:
            raise DyncompError(f"Attention: {t} positions; the ledger counts at most {MAX_LENGTH}")
        q, k, v = (self._project(x, name, n, p) for name, n in (("q", h), ("k", g), ("v", g)))
        q, k = self._normed(q, k)
        real = None if mask is None else mask.astype(bool)
        place = jnp.arange(t, dtype=jnp.int32) + (jnp.int32(0) if cache is None else cache.length)
        positions = place[None] if positions is None else positions
        plans: dict[str, Any] = {}
        sampled = self.sampler is not None and (train or self.has_rng("dropout"))
        if cache is None:
            q, k = self._turn(q, positions), self._turn(k, positions)
            key_place = place[None] if real is None else jnp.where(real, place[None], -1)
            sight = Sight(place, key_place, visible, self.causal, self.window)
            if sampled:
                mixed, work, plans = self._drawn(q, k, v, sight, capture)
            else:
                mixed, work = self._whole(q, k, v, sight, real)
            plans |= {"heads": {"q": q, "k": k, "v": v}} if "heads" in capture else {}
        elif sampled:
            raise DyncompError(
                "Attention.sampler goes without a cache; leave out the stream 'dropout' (then the pass is dense)"
            )
        else:
            mix = functools.partial(self._mix, place=place, visible=visible)
            plain = self.causal and self.window is None and visible is None
            asked = Asked(q, k, v, positions, place, real, self._turn, mix, plain, below)
            cache, mixed, work = self._cached(cache, asked, visible)
        y = self._out(constrain(mixed, ("batch", "seq", "heads", None)), d)
        events = self._events(real, b, t, work)
        if self.sampler is not None:
            events["draws"] = events["projections"] if sampled else count(0)
        return y, Aux(events=events, cache=cache, plans=plans, below=_handed(cache))

    def _drawn(self, q, k, v, sight: Sight, capture) -> tuple[Array, Work, dict[str, Any]]:
        """A fresh draw, what it cost, and its plan where that is asked for."""
        drawn = self._sampled(q, k, v, sight)
        shown = "plan" in capture and drawn.plan is not None
        work = Work(jnp.int32(drawn.executed), drawn.needed)
        return drawn.mixed, work, {"sampled": drawn.plan} if shown else {}

    def _sampled(self, q: Array, k: Array, v: Array, sight: Sight) -> Sampled:
        """A fresh draw.

        Raises:
          DyncompError: a window or ``visible``.
        """
        if self.window is not None or sight.visible is not None:
            raise DyncompError(
                "Attention.sampler goes without a window and visible; leave out the stream 'dropout' (then the pass is"
                " dense) or the other one"
            )
        assert self.sampler is not None
        check_factory(self.sampler, "Attention.sampler")
        return self.sampler()(self.make_rng("dropout"), q, k, v, sight)

    def _whole(self, q, k, v, sight: Sight, real: Array | None) -> tuple[Array, Work]:
        """Without a cache."""
        b, t = q.shape[:2]
        if self._sparse_from(t):
            mixed, pairs = self._sparse(q, k, v, sight, padded=real is not None)
            return mixed, Work(pairs.executed, jnp.broadcast_to(pairs.needed, (b,)))
        apart = parts("batch", "seq") > 1
        if apart and sight.visible is None and self.across == "ring":
            return ring_attention(q, k, v, sight), self._square(b, t, real, sight)
        if not apart and band_serves(t, sight):
            mixed, pairs = banded(q, k, v, sight)
            return mixed, Work(pairs, self._dense(b, t, real, jnp.int32(0), sight))
        if apart:
            k, v = (constrain(x, ("batch", None, "kv_heads", None)) for x in (k, v))
        elif fused_serves(q, sight, real):
            # Tiles above the diagonal are skipped; those on it count by their seen half.
            pairs = t * (t + 1) // 2 if self.causal else t * t
            mixed = fused_attention(q, k, v, self.causal)
            return mixed, Work(jnp.int32(pairs), jnp.full((b,), pairs, jnp.int32))
        everything = real is None and sight.visible is None and not self.causal
        mixed = attend(q, k, v, None if everything else sight.all())
        return mixed, self._square(b, t, real, sight)

    def _square(self, b: int, t: int, real: Array | None, sight: Sight) -> Work:
        """Every query with every key, of which dense attention needs some."""
        seen = None if self.window is None and sight.visible is None else sight
        return Work(jnp.int32(t * t), self._dense(b, t, real, jnp.int32(0), seen))

    def _cached(self, cache, asked: Asked, visible) -> tuple[CacheState, Array, Work]:
        """As the cache's policy attends, with the pairs needed where it does not say."""
        seen = cache.seen()
        cache, mixed, work = cache.policy.attend(cache, asked)
        if work.needed is None and self._sparse_from(asked.q.shape[1]):
            # A pattern needs what it computes.
            work = dataclasses.replace(
                work, needed=jnp.broadcast_to(work.pairs, (asked.q.shape[0],))
            )
        elif work.needed is None:
            work = dataclasses.replace(work, needed=self._needed(asked, cache, seen, visible))
        return cache, mixed, work

    def _mix(self, q, k, v, key_place, *, place, visible, **more) -> tuple[Array, Array]:
        """Attention of new positions over the slots of a cache, as `Asked.mix` tells."""
        sight = Sight(place, key_place, visible, self.causal, self.window)
        sight = dataclasses.replace(sight, **more) if more else sight
        if self._sparse_from(q.shape[1]):
            if more:
                raise DyncompError(
                    "Attention.pattern goes without a cache that hides or anchors slots (SinkWindow); use pattern=None"
                    " or another cache"
                )
            mixed, pairs = self._sparse(q, k, v, sight)
            return mixed, pairs.executed
        return attend_seen(q, k, v, sight)

    def _sparse_from(self, t: int) -> bool:
        return self.pattern is not None and t >= max(self.pattern_from, 2)

    def _needed(self, asked: Asked, cache: Any, seen: Array, visible: Array | None) -> Array:
        """Pairs that dense attention needs behind ``seen`` tokens."""
        b, t = asked.q.shape[:2]
        if self.window is None and visible is None:
            return self._dense(b, t, asked.real, seen, None)
        sight = Sight(asked.place, cache.positions, visible, self.causal, self.window)
        return self._dense(b, t, asked.real, seen, sight)

    def _dense(self, b: int, t: int, real, earlier: Array, sight: Sight | None) -> Array:
        """By a closed form, or by the table of a window (which counts padded slots) or a tree: [b]."""
        if sight is not None:
            pairs = sight.all() if real is None else sight.all() & real[:, :, None]
            return jnp.broadcast_to(jnp.sum(pairs, axis=(1, 2), dtype=jnp.int32), (b,))
        tokens = _tokens(real, b, t)
        own = tokens * (tokens + 1) // 2 if self.causal else tokens * tokens
        return own + tokens * earlier

    def _sparse(
        self, q: Array, k: Array, v: Array, sight: Sight, padded: bool = True
    ) -> tuple[Array, Count]:
        """The pattern's values and pairs. What it decides at run time lies under ``controls``, at ``pattern``.

        Raises:
          DyncompError: a pattern together with a window, with ``visible``, or without causality.
        """
        if self.window is not None or sight.visible is not None or not self.causal:
            raise DyncompError(
                "Attention.pattern goes with causal=True, window=None and without visible; leave one of them out"
            )
        assert self.pattern is not None
        check_factory(self.pattern, "Attention.pattern")
        told = self.get_variable("controls", "pattern")
        mixed, pairs = on_own_heads(self.pattern(), q, k, v, sight, told, padded)
        return mixed, jax.tree.map(lambda x: jnp.round(x).astype(jnp.int32), pairs)

    def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        if not self.qk_norm:
            return q, k
        return self._head_norm(q, "q_norm"), self._head_norm(k, "k_norm")

    def _turn(
        self, x: Float[Array, "b n k p"], positions: Int[Array, "#b n"], most: int | None = None
    ) -> Array:
        """With positions; ``most``: all of them are in [0, most)."""
        if self.rope_theta is None:
            return x
        scaling = self.rope_scaling
        if most is not None:
            return rotate_below(x, positions, most, self.rope_theta, scaling)
        angles = rope_angles(positions, x.shape[-1], self.rope_theta, scaling)
        return rotate(x, angles, 1.0 if scaling is None else scaling.amplitude)

    def _head_norm(self, x: Array, name: str) -> Array:
        ones, dtype = nn.initializers.ones_init(), self.dtypes.param
        return rms_norm(
            x, param(self, name, ones, x.shape[-1:], ("head_dim",), dtype), eps=self.eps
        )

    def _project(self, x: Array, name: str, heads: int, p: int) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        axis = "heads" if name == "q" else "kv_heads"
        dtype = self.dtypes.param
        kernel = param(
            self, name, init, (x.shape[-1], heads, p), ("embed", axis, "head_dim"), dtype
        )
        y = dense_matmul(x, kernel.astype(x.dtype))
        if self.bias if self.qkv_bias is None else self.qkv_bias:
            zeros = nn.initializers.zeros_init()
            shift = param(self, f"{name}_bias", zeros, (heads, p), (axis, "head_dim"), dtype)
            y = y + shift.astype(x.dtype)[None, None]
        return constrain(y, ("batch", "seq", axis, None))

    def _out(self, mixed: Array, d: int) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        h, p = mixed.shape[2:]
        dtype = self.dtypes.param
        kernel = param(self, "out", init, (h, p, d), ("heads", "head_dim", "embed"), dtype)
        y = dense_matmul(mixed, kernel.astype(mixed.dtype), axes=2)
        if self.bias:
            shift = param(self, "out_bias", nn.initializers.zeros_init(), (d,), ("embed",), dtype)
            y = y + shift.astype(y.dtype)[None, None]
        return y

    def _events(self, real: Array | None, b: int, t: int, work: Work) -> dict[str, Count]:
        assert work.needed is not None
        events = {
            "projections": count(jnp.sum(_tokens(real, b, t)), b * t),
            **pair_events(work.needed, work.pairs),
        }
        if work.scored is not None:
            events["scored"] = count(b * work.scored, b * work.scored)
        return events

    def cost(self, d_model: int, length: int) -> dict[str, Cost]:
        """Price of a token's projections, of a pair and of a block of pairs (the length is in the counts).

        And of a token's share in drawing, where there is a sampler.
        """
        h, g, p = self.sizes(d_model)
        width = (2 * h + 2 * g) * p
        item = self.dtypes.compute_itemsize
        pair = Cost(4 * h * p)
        drawn = (
            {} if self.sampler is None else {"draws": self.sampler().cost((h, g, p), length, item)}
        )
        scored = {} if self.cache is FullCache else {"scored": Cost(2 * h * p)}
        return {
            **drawn,
            **scored,
            "projections": Cost(2 * d_model * width, (2 * d_model + width) * item),
            "pair_blocks": pair * PAIR_BLOCK,
            "pairs": pair,
        }

    def init_cache(self, d_model: int, batch: int, max_length: int) -> Any:
        """An empty cache of this layer, in the compute dtype."""
        check_factory(self.cache, "Attention.cache")
        h, g, p = self.sizes(d_model)
        policy = self.cache(max_length=max_length)
        return policy.init(batch, g, p, self.dtypes.compute, heads=h)


def _tokens(real: Bool[Array, "b t"] | None, b: int, t: int) -> Int[Array, "b"]:
    """Real positions of each row."""
    return jnp.full((b,), t, jnp.int32) if real is None else jnp.sum(real, axis=1, dtype=jnp.int32)


def _handed(cache: CacheState | None) -> Mapping[str, Array]:
    """What goes up to the next layer's policy."""
    return {} if cache is None else cache.handed()
