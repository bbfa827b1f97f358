"""Which tokens of a prompt matter: their share of the attention of a few probing queries (ZipVL, arXiv 2410.08584)."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from dyncomp.attention.selection import covering, gathered_first, recent_attention, split_by
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp_kernels._compat import vary_like

Probe = Literal["recent", "random", "both", "all"]
Ranking = Literal["normalised", "accumulated", "random"]
Normaliser = Literal["columns", "probe"]

ROWS = 64
"""Probing queries whose attention is held at once."""


@struct.dataclass
class Split:
    """A split of s slots.

    Attributes:
      order: int32 [b s], the important slots T ascending, then the other real ones U ascending, then the rest.
      count: int32 [b], how many are important: p.
      wanted: int32 [b], p before the cap.
      real: int32 [b], |T| + |U|.
      mass: float32 [b s], accumulated attention a of each slot, the mean over heads.
      scores: float32 [b s], by which slots were ranked.
      probes: probing queries (static); each was scored against all s slots.
    """

    order: Int[Array, "b s"]
    count: Int[Array, "b"]
    wanted: Int[Array, "b"]
    real: Int[Array, "b"]
    mass: Float[Array, "b s"]
    scores: Float[Array, "b s"]
    probes: int = struct.field(pytree_node=False)


def key_mass(
    q: Float[Array, "b w h p"],
    k: Float[Array, "b s g p"],
    place: Int[Array, "b w"],
    real: Bool[Array, "b s"],
) -> Float[Array, "b s"]:
    """Attention that each key gets from some queries in all, causal, the mean over heads: a of eq. 6, float32.

    Args:
      place: slots of the queries; -1 for those that do not count.
      real: False for padding.
    """
    b, w = place.shape
    extra = -w % min(ROWS, w)
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    place = jnp.pad(place, ((0, 0), (0, extra)), constant_values=-1)
    split = lambda x: jnp.moveaxis(x.reshape(b, -1, min(ROWS, w), *x.shape[2:]), 1, 0)

    def add(mass: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        weights = recent_attention(part[0], k, part[1], real)
        return mass + jnp.mean(jnp.sum(weights, axis=2), axis=1), None

    blank = vary_like(jnp.zeros(real.shape, jnp.float32), q, k, place, real)
    return lax.scan(add, blank, (split(q), split(place)))[0]


def seen_by(place: Int[Array, "b w"], slots: int) -> Int[Array, "b s"]:
    """How many of some queries, at ``place`` (-1: does not count), can see each slot."""
    hits = jax.vmap(lambda own: jnp.zeros((slots,), jnp.int32).at[own].add(1, mode="drop"))(
        jnp.where(place >= 0, place, slots)
    )
    return jnp.cumsum(hits[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]


def later(real: Bool[Array, "b s"]) -> Int[Array, "b s"]:
    """Real slots from each one on: what a whole causal column holds, n - j without padding."""
    return jnp.cumsum(real[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]


@dataclasses.dataclass(frozen=True)
class Importance:
    """How important tokens are found: how many (a share of all attention), and which (a ranking).

    p is the least number of tokens whose accumulated attention a reaches ``tau`` of all (eq. 6). Which ones is told by
    another vector, the normalised attention a / nnz (eq. 8). The last real token is always one of them.

    Attributes:
      tau: share of the attention mass; from 1 on every token is important.
      ranking: "normalised"; "accumulated", which prefers early tokens because more queries see them; or "random".
      normaliser: nnz is the number of real tokens from j on ("columns", as in ZipCache's code), or of probing queries
        that see j ("probe", the paper's words; noisy for late tokens).
      probe: whose attention is looked at: the newest queries, some drawn from the earlier ones with replacement, both,
        or every query.
      recent, drawn: how many of each. ZipCache's code takes 5% of the prompt each; ZipVL's split was not found.
      most: cap on p: of more wanted tokens the best stay, and the others count as unimportant. None for none.
      seed: of what is drawn.
    """

    tau: float = 0.975
    ranking: Ranking = "normalised"
    normaliser: Normaliser = "columns"
    probe: Probe = "both"
    recent: int = 64
    drawn: int = 64
    most: int | None = None
    seed: int = 0

    def __post_init__(self):
        told = {"ranking": Ranking, "normaliser": Normaliser, "probe": Probe}
        for name, kinds in told.items():
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(map(repr, get_args(kinds)))
                raise DyncompError(f"Importance.{name}={getattr(self, name)!r}: use {known}")
        if not self.tau > 0 or self.recent < 1 or self.drawn < 1:
            raise DyncompError(
                f"Importance: tau={self.tau}, recent={self.recent}, drawn={self.drawn}; use more than 0"
            )
        if self.most is not None and self.most < 1:
            raise DyncompError(f"Importance.most={self.most}: use at least 1, or None")

    def cap(self, slots: int) -> int:
        """Most important tokens among so many slots."""
        return slots if self.most is None else min(self.most, slots)

    def choose(
        self,
        q: Float[Array, "b t h p"],
        k: Float[Array, "b s g p"],
        place: Int[Array, "t"],
        real: Bool[Array, "b s"],
        tau: Float[Array, ""] | None = None,
        budget: Int[Array, "b"] | None = None,
    ) -> Split:
        """Splits slots by the attention of some of the queries at ``place``.

        Args:
          tau: run-time value instead of the attribute's.
          budget: p itself where it is at least 0.
        """
        s = k.shape[1]
        probes, own = self._probes(q, place, real)
        mass = key_mass(probes, k, own, real)
        total = jnp.sum(own >= 0, axis=1).astype(jnp.float32)
        wanted = covering(mass, self.tau if tau is None else tau, total)
        if budget is not None:
            wanted = jnp.where(budget >= 0, budget, wanted)
        scores = self.ranked(mass, own, real)
        last = (
            jnp.arange(s, dtype=jnp.int32)[None]
            == s - 1 - jnp.argmax(real[:, ::-1], axis=1)[:, None]
        )
        scores = jnp.where(last, jnp.inf, scores)
        tokens = jnp.sum(real, axis=1, dtype=jnp.int32)
        wanted = jnp.minimum(jnp.maximum(wanted, 1), tokens)
        count = jnp.minimum(wanted, self.cap(s))
        return Split(
            split_by(scores, count, real), count, wanted, tokens, mass, scores, own.shape[1]
        )

    def ranked(
        self, mass: Float[Array, "b s"], place: Int[Array, "b w"], real: Bool[Array, "b s"]
    ) -> Float[Array, "b s"]:
        """Scores of slots, by their mass and the places of the queries that gave it."""
        if self.ranking == "accumulated":
            return mass
        if self.ranking == "random":
            # Layers and inputs should not share a draw, and their masses differ.
            bits = lax.bitcast_convert_type(jnp.sum(mass * mass, axis=1), jnp.uint32)
            start = jax.random.key(self.seed)
            draw = lambda own: jax.random.uniform(jax.random.fold_in(start, own), mass.shape[1:])
            return jax.vmap(draw)(bits)
        nnz = later(real) if self.normaliser == "columns" else seen_by(place, mass.shape[1])
        return mass / jnp.maximum(nnz, 1).astype(jnp.float32)

    def _probes(self, q: Array, place: Array, real: Array) -> tuple[Array, Array]:
        """Probing queries [b w h p] and their slots [b w], -1 where a row has too few real tokens."""
        own = jnp.take(real, place, axis=1)
        if self.probe == "all":
            return q, jnp.where(own, place[None], -1)
        tokens = jnp.sum(own, axis=1, dtype=jnp.int32)[:, None]
        recent, ranks = min(self.recent, q.shape[1]), []
        if self.probe != "random":
            ranks.append(tokens - 1 - jnp.arange(recent, dtype=jnp.int32)[None])
        if self.probe != "recent":
            earlier = tokens - recent if self.probe == "both" else tokens
            draw = jax.random.uniform(jax.random.key(self.seed), (1, self.drawn))
            at = jnp.minimum((draw * earlier).astype(jnp.int32), earlier - 1)
            ranks.append(jnp.where(earlier > 0, at, -1))
        rank = jnp.concatenate(ranks, axis=1)
        order = gathered_first(own, ~own)
        row = jnp.take_along_axis(order, jnp.maximum(rank, 0), axis=1)
        probes = jnp.take_along_axis(q, row[:, :, None, None], axis=1)
        return probes, jnp.where(rank >= 0, jnp.take(place, row), -1)
