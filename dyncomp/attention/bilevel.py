"""Bi-level routing attention on the mixer seam: regions choose regions, tokens attend within those they chose."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from dyncomp.attention.attend import attend
from dyncomp.attention.attention import PAIR_BLOCK, pair_events
from dyncomp.attention.depthwise import DepthwiseConv, Grid, grid_of
from dyncomp.attention.regions import (
    Regions,
    gathered_attention,
    listed_attention,
    region_scores,
)
from dyncomp.core.aux import Aux, Count, count
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels.dense_matmul.api import dense_matmul

Select = Literal["routed", "local", "random"]
Routing = Literal["detached", "soft", "soft_learned"]
OPTIONS = {
    "select": ("routed", "local", "random"),
    "routing": ("detached", "soft", "soft_learned"),
    "scale": ("width", "head"),
    "local_on": ("values", "input"),
    "dispatch": ("gather", "lists"),
}


@struct.dataclass
class RegionPlan:
    """Which regions every region reads.

    Attributes:
      index: int32 [b r k], regions in row-major order; no two of a row alike.
      scores: float32 [b r k], by which they were chosen, highest first (0 where nothing was scored).
    """

    index: Int[Array, "*l b r k"]
    scores: Float[Array, "*l b r k"]


class BiLevelRouting(nn.Module):
    """Multi-head attention of every region of a 2-D grid over the tokens of its top-k regions (arXiv 2303.08810).

    A region's query and key are the means of its tokens', all heads together, so one choice serves all heads. It is
    not symmetric, and a region may leave itself out. No gradient passes through the choice (``detached``): queries and
    keys learn from the attention between tokens. Beside it, a depthwise convolution of the values over the whole grid.
    Not causal, no cache.

    Events: ``projections`` and ``local`` (per token), ``pair_blocks`` and ``pairs`` (query-key pairs over all heads),
    and of routing ``pooled`` (tokens averaged) and ``region_pairs`` (products of means).

    Attributes:
      heads: h, a divisor of d.
      regions: per side; side x side in all.
      top: regions that a region reads; None for plain attention over all tokens, without regions.
      grid: rows and columns of the tokens; None for a square.
      select: "routed", or the controls "local" (itself and its nearest, fixed) and "random" (drawn in every pass from
        the stream ``router``, where there is one, else from the values, so that evaluation repeats itself).
      routing: "soft" multiplies the keys and values of a region by the softmax of the chosen scores (the released
        code's ``soft_routing``), "soft_learned" lets gradients through it (and ``diff_routing``).
      scale: of token scores: 1 / sqrt(d) as in the released code, or 1 / sqrt(d / h) as in the paper's text.
      local: side of the convolution's kernel; 0 for none.
      local_on: what it is applied to: values, or the mixer's input (the released code's last stage).
      qkv_bias: biases on queries, keys and values; the output always has one.
      dispatch: "gather" copies keys and values k times into dense products, "lists" reads them in place, block by
        block; the same values. Small regions want "gather", large ones with little memory "lists".
    """

    heads: int
    regions: int
    top: int | None
    grid: Grid = None
    select: Select = "routed"
    routing: Routing = "detached"
    scale: Literal["width", "head"] = "width"
    local: int = 5
    local_on: Literal["values", "input"] = "values"
    qkv_bias: bool = True
    dispatch: Literal["gather", "lists"] = "gather"
    dtypes: DTypes = DTypes()

    def check(self, d_model: int) -> None:
        """Refuses options that make no sense.

        Raises:
          DyncompError: names the option and what to use.
        """
        for name, allowed in OPTIONS.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise DyncompError(f"BiLevelRouting.{name}={getattr(self, name)!r}: use {known}")
        if d_model % self.heads:
            raise DyncompError(
                f"BiLevelRouting: d_model={d_model} is not a multiple of heads={self.heads}; use a divisor"
            )
        most = self.regions**2
        if self.top is not None and not 1 <= self.top <= most:
            raise DyncompError(f"BiLevelRouting.top={self.top}: use 1 to {most} regions, or None")
        if self.routing != "detached" and (self.dispatch, self.select) != ("gather", "routed"):
            raise DyncompError(
                f"BiLevelRouting.routing={self.routing!r} goes with select='routed' and dispatch='gather' only"
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: Any = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Mixes the tokens of a grid, given in row-major order.

        Args:
          positions: not used; the convolution knows places.
          mask: [b t], 1 (or True) for real tokens; others are neither averaged nor attended to.
          cache: must be None.
          capture: "plan" for the `RegionPlan`.
        """
        del positions, train
        b, t, d = x.shape
        self.check(d)
        if cache is not None:
            raise DyncompError("BiLevelRouting has no cache: it is not causal; use Attention")
        q, k, v = (self._project(x, name) for name in ("q", "k", "v"))
        real = None if mask is None else mask.astype(bool)
        scaled = q if self.scale == "head" else q * (1.0 / math.sqrt(self.heads))
        if self.top is None:
            mixed, plan, events = self._all(scaled, k, v, real)
        else:
            grid = Regions(*grid_of(self.grid, t), self.regions)
            mixed, plan, events = self._routed(grid, q, scaled, k, v, real)
        mixed = constrain(mixed, ("batch", "seq", "heads", None)).reshape(b, t, d)
        if self.local:
            near = x if self.local_on == "input" else v.reshape(b, t, d)
            near = near if real is None else jnp.where(real[..., None], near, 0)
            mixed = mixed + DepthwiseConv(self.local, self.grid, self.dtypes, name="local_conv")(
                near
            )
        tokens = b * t if real is None else jnp.sum(real, dtype=jnp.int32)
        events |= dict.fromkeys(
            ["projections", "local"] if self.local else ["projections"], count(tokens, b * t)
        )
        plans = {"regions": plan} if plan is not None and "plan" in capture else {}
        return self._out(mixed), Aux(events=events, plans=plans)

    def _all(self, q: Array, k: Array, v: Array, real: Array | None) -> tuple[Array, None, dict]:
        """Attention over all tokens."""
        b, t = q.shape[:2]
        allowed = None if real is None else jnp.broadcast_to(real[:, None], (b, t, t))
        own = jnp.full((b,), t, jnp.int32) if real is None else jnp.sum(real, 1, jnp.int32)
        return attend(q, k, v, allowed), None, pair_events(own * own, t * t)

    def _routed(
        self, grid: Regions, q: Array, scaled: Array, k: Array, v: Array, real: Array | None
    ) -> tuple[Array, RegionPlan, dict[str, Count]]:
        """Attention over the tokens of the chosen regions."""
        there = grid.real(real, q.shape[0])
        q, scaled, k, v = (grid.split(x) for x in (q, scaled, k, v))
        plan = self._choose(grid, q, k, there)
        if self.dispatch == "lists":
            mixed = listed_attention(scaled, k, v, plan.index, there)
        else:
            mixed = gathered_attention(scaled, k, v, plan.index, there, self._weights(plan, q))
        return grid.join(mixed), plan, self._events(grid, plan.index, there)

    def _choose(self, grid: Regions, q: Array, k: Array, real: Bool[Array, "b r w"]) -> RegionPlan:
        """The plan: top-k of the scores, the lower index first where they are equal."""
        assert self.top is not None
        shape = (q.shape[0], grid.count, self.top)
        if self.select == "local":
            index = jnp.broadcast_to(jnp.asarray(grid.nearest(self.top))[None], shape)
            return RegionPlan(index, jnp.zeros(shape, jnp.float32))
        if self.select == "random":
            draws = jax.random.uniform(self._key(q), (*shape[:2], grid.count))
            return RegionPlan(
                lax.top_k(draws, self.top)[1].astype(jnp.int32), jnp.zeros(shape, jnp.float32)
            )
        if self.routing != "soft_learned":
            q, k = lax.stop_gradient(q), lax.stop_gradient(k)
        scores, index = lax.top_k(region_scores(q, k, real), self.top)
        return RegionPlan(index.astype(jnp.int32), scores)

    def _key(self, q: Array) -> Array:
        """A random key of this pass."""
        if self.has_rng("router"):
            return self.make_rng("router")
        bits = lax.bitcast_convert_type(jnp.sum(q.astype(jnp.float32)), jnp.int32)
        return jax.random.fold_in(jax.random.key(0), bits)

    def _weights(self, plan: RegionPlan, q: Array) -> Float[Array, "b r k"] | None:
        """Softmax of the chosen scores, which the code scales by the full width."""
        if self.routing == "detached":
            return None
        width = q.shape[-2] * q.shape[-1]
        return jax.nn.softmax(plan.scores * jnp.float32(1.0 / math.sqrt(width)), axis=-1)

    def _project(self, x: Array, name: str) -> Float[Array, "b t h p"]:
        d, h, dtype = x.shape[-1], self.heads, self.dtypes.param
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))
        axes = ("heads", "head_dim")
        kernel = param(self, name, init, (d, h, d // h), ("embed", *axes), dtype)
        y = dense_matmul(x, kernel.astype(x.dtype))
        if self.qkv_bias:
            zeros = nn.initializers.zeros_init()
            shift = param(self, f"{name}_bias", zeros, (h, d // h), axes, dtype)
            y = y + shift.astype(x.dtype)[None, None]
        return constrain(y, ("batch", "seq", *axes))

    def _out(self, mixed: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        d, dtype = mixed.shape[-1], self.dtypes.param
        init, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        kernel = param(self, "out", init, (d, d), ("heads", "embed"), dtype)
        bias = param(self, "out_bias", zeros, (d,), ("embed",), dtype)
        return (
            dense_matmul(mixed, kernel.astype(mixed.dtype)) + bias.astype(mixed.dtype)[None, None]
        )

    def _events(self, grid: Regions, index: Array, real: Array) -> dict[str, Count]:
        """Pairs of real tokens of regions that read each other, and what choosing them took."""
        own = jnp.sum(real, axis=-1, dtype=jnp.int32)  # [b r]
        b, r, k = index.shape
        read = jnp.sum(jax.vmap(lambda x, chosen: x[chosen])(own, index), axis=-1)
        events = pair_events(jnp.sum(own * read, axis=-1), r * grid.size * k * grid.size)
        if self.select == "routed":
            some = jnp.sum(jnp.any(own > 0, axis=-1), dtype=jnp.int32)
            events["pooled"] = count(jnp.sum(own), b * r * grid.size)
            events["region_pairs"] = count(some * r * r, b * r * r)
        return events

    def cost(self, d_model: int, length: int) -> dict[str, Cost]:
        """Price of a token's projections, of a pair, a block of pairs, a token pooled, a product of means."""
        del length
        self.check(d_model)
        item = self.dtypes.compute_itemsize
        pair = Cost(4 * d_model)
        near = DepthwiseConv(self.local, dtypes=self.dtypes, parent=None).cost(d_model)
        local = {"local": near} if self.local else {}
        return {
            "projections": Cost(8 * d_model**2, 6 * d_model * item),
            "pair_blocks": pair * PAIR_BLOCK,
            "pairs": pair,
            **local,
            "pooled": Cost(2 * d_model),
            "region_pairs": Cost(2 * d_model),
        }

    def init_cache(self, d_model: int, batch: int, max_length: int) -> Any:
        """Refuses.

        Raises:
          DyncompError: always.
        """
        raise DyncompError("BiLevelRouting has no cache: it is not causal; use Attention")
