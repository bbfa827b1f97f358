"""Attention over a fresh random share of the keys: for training, and for sampling again at inference.

A sampler is a frozen dataclass of static choices; ``Attention.sampler`` names its factory. It draws for every sequence
on its own, from a key that is already the layer's and the step's, and draws the same again from the same key, so
rematerialisation changes nothing. What is left out is never computed: keys are gathered, not masked. Queries and keys
come with their rotary positions, and what a query may see follows from original positions (information pathways, arXiv
2306.01705, section 3; the algorithms as the authors' text describes them, no code was published).
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp.attention.attend import attend, scores_of, weighted
from dyncomp.attention.draws import (
    example_keys,
    inverse,
    permuted,
    random_subset,
    shuffled_order,
    take_rows,
)
from dyncomp.attention.sight import Sight
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Bool, Float, Int, Key
from dyncomp_kernels.sparse_attention.running import LOWEST


@struct.dataclass
class KeySets:
    """Which keys a pass read; x: sequences, or sequences times key/value heads.

    Attributes:
      sets: int32 [x c m], positions of each set, -1 for filling.
      own: int32 [x t], the set that a query reads (and, under `RandomKeys` with causality, itself).
    """

    sets: Any  # unchecked: jax also builds trees of shapes and None
    own: Any

    def table(self) -> Bool[Array, "x t t"]:
        """The whole table, before causality: for pictures and tests."""
        t = self.own.shape[1]
        places = jnp.arange(t, dtype=jnp.int32)[None, None, None]
        member = jnp.any(self.sets[..., None] == places, axis=2)  # [x c t]
        return jnp.take_along_axis(member, self.own[..., None], axis=1)


@struct.dataclass
class Sampled:
    """What a sampler hands back.

    Attributes:
      mixed: [b t h p].
      needed: int32 [b], pairs that a real query sees, a mean over heads.
      plan: `KeySets`, or None where no key is left out.
      executed: pairs computed for a sequence (static).
    """

    mixed: Any
    needed: Any
    plan: Any
    executed: int = struct.field(pytree_node=False)


@runtime_checkable
class Sampler(Protocol):
    """What `Attention.sampler` makes."""

    def __call__(
        self, key: Key[Array, ""], q: Float[Array, "b t h p"], k: Array, v: Array, sight: Sight
    ) -> Sampled:
        """One draw; ``sight`` is that of a pass without a cache (t queries, t slots)."""
        ...

    def cost(self, sizes: tuple[int, int, int], length: int, itemsize: int) -> Cost:
        """Price of a position's share in drawing and in moving rows; ``sizes`` are h, g, p."""
        ...


@dataclasses.dataclass(frozen=True)
class RandomKeys:
    """A random ``1 / reduction`` of the keys, one subset for all queries of a layer and sequence ("unbiased").

    ceil(t / reduction) keys without replacement, in order of position; padding only where real keys run out. Under
    causality every query also reads itself, or the first ones would read nothing. Weights are not rescaled: softmax
    renormalises.

    Attributes:
      reduction: r; 1 is dense attention, bit for bit.
      per_head: another subset for each key/value head.
    """

    reduction: int = 4
    per_head: bool = False

    def __post_init__(self):
        _check(self.reduction, "RandomKeys")

    def __call__(self, key, q, k, v, sight):
        """Executed: t * ceil(t / r) pairs, and t where a query's own key is added."""
        shape, (q, k, v, place) = q.shape, _rows(q, k, v, sight, self.per_head)
        t = place.shape[1]
        index = random_subset(key, place >= 0, -(-t // self.reduction))
        held = jnp.take_along_axis(place, index, axis=1)
        seen = jnp.broadcast_to((held >= 0)[:, None], (*place.shape, held.shape[1]))
        if sight.causal:
            seen = seen & (held[:, None] <= sight.place[None, :, None])
        pairs, keys, values = seen, take_rows(k, index), take_rows(v, index)
        add_self = sight.causal and held.shape[1] < t
        if add_self:
            fresh = ~jnp.any(held[:, None] == sight.place[None, :, None], axis=2)
            mixed = _attend_and_self(q, (keys, values, seen), (k, v, fresh))
            pairs = jnp.concatenate([seen, fresh[..., None]], axis=2)
        else:
            mixed = attend(q, keys, values, seen)
        needed = _needed(pairs & (place >= 0)[..., None], shape[0])
        plan = KeySets(jnp.where(held >= 0, index, -1)[:, None], jnp.zeros_like(place))
        return Sampled(_joined(mixed, shape), needed, plan, t * (held.shape[1] + add_self))

    def cost(self, sizes, length, itemsize):
        """A sort of one number a position; keys and values are moved for the subset."""
        h, g, p = sizes
        draws = g if self.per_head else 1
        return Cost(draws * length.bit_length(), 4 * g * p * itemsize // self.reduction)


@dataclasses.dataclass(frozen=True)
class ShuffledWindows:
    """Windows of a locally shuffled sequence ("locally biased"): near keys are read more often than far ones.

    Positions are sorted by ``i + sigma * normal noise`` and cut into windows of ceil(t / reduction); a query reads its
    window, itself always. Padding is sorted to the end and never read.

    Attributes:
      reduction: r; 1 is dense attention but for the order of sums.
      sigma: in positions; 0 gives plain windows, a large one random sets.
      per_head: another order for each key/value head.
    """

    reduction: int = 4
    sigma: float = 5.0
    per_head: bool = False

    def __post_init__(self):
        _check(self.reduction, "ShuffledWindows")
        if self.sigma < 0:
            raise DyncompError(f"ShuffledWindows.sigma={self.sigma}: use 0 or more")

    def __call__(self, key, q, k, v, sight):
        """Executed: c * w^2 pairs, w = ceil(t / r), c = ceil(t / w)."""
        shape, (q, k, v, place) = q.shape, _rows(q, k, v, sight, self.per_head)
        x, t = place.shape
        w = -(-t // self.reduction)
        c = -(-t // w)
        order = shuffled_order(key, place >= 0, self.sigma)
        fill = jnp.broadcast_to(jnp.arange(t, c * w, dtype=jnp.int32), (x, c * w - t))
        order = jnp.concatenate([order, fill], axis=1)
        back = inverse(order)
        widen = lambda a: jnp.pad(a, ((0, 0), (0, c * w - t), (0, 0), (0, 0)))
        cut = lambda a: permuted(widen(a), order, back).reshape(x * c, w, *a.shape[2:])
        held = jnp.pad(place, ((0, 0), (0, c * w - t)), constant_values=-1)
        held = jnp.take_along_axis(held, order, axis=1).reshape(x * c, w)
        seen = jnp.broadcast_to((held >= 0)[:, None], (x * c, w, w))
        if sight.causal:
            seen = seen & (held[:, None] <= held[..., None])
        mixed = attend(cut(q), cut(k), cut(v), seen).reshape(x, c * w, *q.shape[2:])
        mixed = permuted(mixed, back, order)[:, :t]
        pairs = (seen & (held >= 0)[..., None]).reshape(x, c * w, w)
        plan = KeySets(jnp.where(held >= 0, order.reshape(x * c, w), -1).reshape(x, c, w),
                       back[:, :t] // w)  # fmt: skip
        return Sampled(_joined(mixed, shape), _needed(pairs, shape[0]), plan, c * w * w)

    def cost(self, sizes, length, itemsize):
        """A normal number and a sort; queries, keys and values are moved, and the result back."""
        h, g, p = sizes
        draws = g if self.per_head else 1
        return Cost(draws * (2 + length.bit_length()), 4 * (h + g) * p * itemsize)


@dataclasses.dataclass(frozen=True)
class DroppedWeights:
    """Attention dropout (Vaswani et al. 2017): single weights vanish after the softmax, the others grow to make up.

    The usual regulariser, to compare with: everything is computed.

    Attributes:
      rate: share of weights that vanish.
    """

    rate: float = 0.1

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise DyncompError(f"DroppedWeights.rate={self.rate}: use [0, 1)")

    def __call__(self, key, q, k, v, sight):
        """Executed: all t^2 pairs."""
        shape, (q, k, v, place) = q.shape, _rows(q, k, v, sight, False)
        seen = jnp.broadcast_to(sight.all(), (*place.shape, place.shape[1]))
        weights = jax.nn.softmax(scores_of(q, k, seen), axis=-1)
        keep = jax.vmap(lambda one, row: jax.random.bernoulli(one, 1 - self.rate, row.shape))(
            example_keys(key, len(weights)), weights
        )
        mixed = weighted(jnp.where(keep, weights / (1 - self.rate), 0.0), v).astype(q.dtype)
        needed = _needed(seen & (place >= 0)[..., None], shape[0])
        return Sampled(mixed.reshape(shape), needed, None, place.shape[1] ** 2)

    def cost(self, sizes, length, itemsize):
        """A number for each weight of a query."""
        return Cost(sizes[0] * length, 0)


def _attend_and_self(q: Array, others: tuple, own: tuple) -> Array:
    """`attend` over gathered keys and, where it is not among them (``fresh``), a query's own: one softmax."""
    (keys, values, seen), (k, v, fresh) = others, own
    x, t, g, p = k.shape
    grouped = q.reshape(x, t, g, -1, p)
    score = jnp.einsum("xtgrp,xtgp->xgrt", grouped, k, preferred_element_type=jnp.float32)
    score = jnp.where(fresh[:, None, None], score * jnp.float32(p**-0.5), LOWEST)
    scores = jnp.concatenate([scores_of(q, keys, seen), score[..., None]], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    self_weight = weights[..., -1].transpose(0, 3, 1, 2)[..., None].astype(v.dtype)
    mixed = weighted(weights[..., :-1], values) + (self_weight * v[:, :, :, None]).astype(
        jnp.float32
    )
    return mixed.reshape(q.shape).astype(q.dtype)


def _rows(q: Array, k: Array, v: Array, sight: Sight, per_head: bool) -> tuple[Array, ...]:
    """(q, k, v, where each key stands): of each sequence, or of each sequence and key/value head."""
    (b, t, _, p), (s, g) = q.shape, k.shape[1:3]
    if s != t:
        raise DyncompError(f"samplers take a pass without a cache; got {t} queries and {s} slots")
    place = jnp.broadcast_to(sight.key_place, (b, t))
    if not per_head:
        return q, k, v, place
    split = lambda a: a.reshape(b, t, g, -1, p).swapaxes(1, 2).reshape(b * g, t, -1, p)
    return split(q), split(k), split(v), jnp.repeat(place, g, axis=0)


def _joined(mixed: Array, shape: tuple[int, ...]) -> Array:
    """Back to [b t h p]."""
    b, t, h, p = shape
    return mixed.reshape(b, -1, t, mixed.shape[2], p).swapaxes(1, 2).reshape(shape)


def _needed(pairs: Bool[Array, "x t m"], batch: int) -> Int[Array, "b"]:
    """Pairs of each sequence, a mean over its heads' draws."""
    each = jnp.sum(pairs, axis=(1, 2), dtype=jnp.int32).reshape(batch, -1)
    return jnp.sum(each, axis=1) // each.shape[1]


def _check(reduction: int, name: str) -> None:
    if reduction < 1:
        raise DyncompError(f"{name}.reduction={reduction}: use 1 or more")
