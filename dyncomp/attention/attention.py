"""Grouped-query attention on the mixer seam."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from dyncomp.attention.attend import attend, attend_seen
from dyncomp.attention.cache import FullCache, KVCache
from dyncomp.attention.rope import RopeScaling, rope_angles, rotate
from dyncomp.attention.sampled import Sampled
from dyncomp.attention.sight import Sight
from dyncomp.core.aux import Aux, Count, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.norms import rms_norm
from dyncomp.core.sharding import constrain, param
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


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads, optional RoPE and a pluggable cache.

    Events: ``projections`` (per token), ``pair_blocks`` and ``pairs`` (query-key pairs over all heads; causal
    attention needs the lower triangle among real tokens and executes the full square, with a cache the blocks of it
    that some query sees).

    Attributes:
      heads: query heads h.
      kv_heads: key/value heads g, a divisor of h; None means h.
      head_dim: p; None means d / h.
      rope_theta: base of RoPE; None for no position signal.
      rope_scaling: changed frequencies for long texts.
      causal: a position sees itself and what precedes it.
      window: a position sees itself and the ``window - 1`` slots before it (Mistral); None for all. The cache still
        keeps everything.
      bias: biases on all four projections.
      qkv_bias: biases on queries, keys and values (Qwen2); None follows ``bias``.
      qk_norm: RMS norm of every query and key head before RoPE (Qwen3).
      eps: of that norm.
      cache: factory of a cache policy, called with ``max_length``.
      pattern: factory of a sparse pattern (`attention.Pattern`) for passes of ``pattern_from`` positions and more;
        shorter ones and single tokens are dense. None for none. Its pairs are both needed and executed.
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
    dtypes: DTypes = DTypes()

    def sizes(self, d_model: int) -> tuple[int, int, int]:
        """(h, g, p) for a model width.

        Raises:
          DyncompError: the heads do not divide each other or the width, or a window that makes no sense.
        """
        if self.window is not None and (self.window < 1 or not self.causal):
            raise DyncompError(
                f"Attention.window={self.window}, causal={self.causal}: a window needs causal=True and 1 or more slots"
            )
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
        cache: KVCache | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        visible: Bool[Array, "#b t w"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Mixes positions.

        Args:
          x: compute dtype.
          positions: what RoPE sees; default the place in the sequence. Causality follows the order of x.
          mask: [b t], 1 (or True) for real tokens; padding is never attended to.
          cache: keys and values of earlier positions; the extended one is in ``Aux.cache``.
          visible: of the newest w slots, those of x included, which each position may see, within what it sees anyway
            (w = t: a tree among the new positions; older slots are seen by all).
        """
        b, t, d = x.shape
        h, g, p = self.sizes(d)
        if t > MAX_LENGTH:
            raise DyncompError(f"Attention: {t} positions; the ledger counts at most {MAX_LENGTH}")
        start = jnp.int32(0) if cache is None else cache.length
        earlier = jnp.zeros((b,), jnp.int32) if cache is None else cache.seen()
        place = (start + jnp.arange(t, dtype=jnp.int32))[None, :]
        q, k, v = (self._project(x, name, n, p) for name, n in (("q", h), ("k", g), ("v", g)))
        q, k = self._placed(q, k, place if positions is None else positions)
        real = None if mask is None else mask.astype(bool)
        if cache is None:
            key_place = place if real is None else jnp.where(real, place, -1)
        else:
            cache, k, v, key_place = cache.policy.extend(cache, k, v, real)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        sight = Sight(place[0], key_place, visible, self.causal, self.window)
        executed: Array | int = t * k.shape[1]
        asked, plans = None, {}
        sampled = self.sampler is not None and (train or self.has_rng("dropout"))
        if sampled:
            drawn = self._sampled(q, k, v, sight, cache)
            mixed, asked, executed = drawn.mixed, drawn.needed, drawn.executed
            if "plan" in capture and drawn.plan is not None:
                plans = {"sampled": drawn.plan}
        elif self.pattern is not None and t >= max(self.pattern_from, 2):
            mixed, executed = self._sparse(q, k, v, sight)
            asked = jnp.broadcast_to(executed, (b,))
        elif cache is not None:
            mixed, executed = attend_seen(q, k, v, sight)
        else:
            everything = real is None and visible is None and not self.causal
            mixed = attend(q, k, v, None if everything else sight.all())
        y = self._out(constrain(mixed, ("batch", "seq", "heads", None)), d)
        pairs = sight.all() if self.window is not None or visible is not None else None
        events = self._events(t, executed, real, earlier, pairs, asked)
        if self.sampler is not None:
            tokens = events["projections"]
            events["draws"] = tokens if sampled else count(0)
        return y, Aux(events=events, cache=cache, plans=plans)

    def _sampled(self, q: Array, k: Array, v: Array, sight: Sight, cache: Any) -> Sampled:
        """A fresh draw.

        Raises:
          DyncompError: a cache, a window or ``visible``.
        """
        if cache is not None or self.window is not None or sight.visible is not None:
            raise DyncompError(
                "Attention.sampler goes without a cache, a window and visible; leave out the stream 'dropout' (then"
                " the pass is dense) or the other one"
            )
        assert self.sampler is not None
        check_factory(self.sampler, "Attention.sampler")
        return self.sampler()(self.make_rng("dropout"), q, k, v, sight)

    def _sparse(self, q: Array, k: Array, v: Array, sight: Sight) -> tuple[Array, Array]:
        """The pattern's values and pairs.

        Raises:
          DyncompError: a pattern together with a window, with ``visible``, or without causality.
        """
        if self.window is not None or sight.visible is not None or not self.causal:
            raise DyncompError(
                "Attention.pattern goes with causal=True, window=None and without visible; leave one of them out"
            )
        assert self.pattern is not None
        check_factory(self.pattern, "Attention.pattern")
        mixed, pairs = self.pattern()(q, k, v, sight)
        return mixed, jnp.round(pairs).astype(jnp.int32)

    def _placed(self, q: Array, k: Array, positions: Array) -> tuple[Array, Array]:
        """Queries and keys with their norms and their positions."""
        if self.qk_norm:
            q, k = (self._head_norm(x, name) for x, name in ((q, "q_norm"), (k, "k_norm")))
        if self.rope_theta is None:
            return q, k
        scaling = self.rope_scaling
        angles = rope_angles(positions, q.shape[-1], self.rope_theta, scaling)
        amplitude = 1.0 if scaling is None else scaling.amplitude
        return rotate(q, angles, amplitude), rotate(k, angles, amplitude)

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

    def _events(
        self,
        t: int,
        executed: Array | int,
        real: Array | None,
        earlier: Array,
        visible: Array | None,
        asked: Array | None,
    ) -> dict[str, Count]:
        """Counts of t new positions behind ``earlier`` [b] real tokens; ``executed`` pairs ran for each sequence.

        ``visible`` [b t s] is given where a closed form would not do: a tree, or a window, which counts padded slots.
        ``asked`` [b] are the pairs that a pattern or a sampler needed.
        """
        b = earlier.shape[0]
        tokens = (
            jnp.full((b,), t, jnp.int32) if real is None else jnp.sum(real, axis=1, dtype=jnp.int32)
        )
        own = tokens * (tokens + 1) // 2 if self.causal else tokens * tokens
        needed = own + tokens * earlier
        if visible is not None:
            pairs = visible if real is None else visible & real[:, :, None]
            needed = jnp.broadcast_to(jnp.sum(pairs, axis=(1, 2), dtype=jnp.int32), (b,))
        if asked is not None:
            needed = asked
        return {
            "projections": count(jnp.sum(tokens), b * t),
            **pair_events(needed, executed),
        }

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
        return {
            **drawn,
            "projections": Cost(2 * d_model * width, (2 * d_model + width) * item),
            "pair_blocks": pair * PAIR_BLOCK,
            "pairs": pair,
        }

    def init_cache(self, d_model: int, batch: int, max_length: int) -> Any:
        """An empty cache of this layer, in the compute dtype."""
        check_factory(self.cache, "Attention.cache")
        _, g, p = self.sizes(d_model)
        return self.cache(max_length=max_length).init(batch, g, p, self.dtypes.compute)
