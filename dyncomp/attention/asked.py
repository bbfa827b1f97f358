"""What a pass asks of a cache policy, and how a long pass is given to it in pieces."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Asked:
    """Queries, keys and values of t new positions, as a mixer hands them to a policy; lives inside one trace.

    Attributes:
      q: [b t h p], after their norms, without positions.
      k, v: [b t g p], the same.
      positions: int32 [#b t], what positions are made of (RoPE).
      place: int32 [t], where the new positions stand in the order of slots.
      real: bool [b t], False for padding; None where there is none.
      turn: (x [b n heads p], positions [#b n], most=None) -> x with its positions; ``most`` says that all of them are
        in [0, most), which is cheaper for many.
      mix: (q, k, v, key_place [b s], **more) -> (mixed, pairs): attention as the mixer would do it without a policy:
        causal by places, its window, its tree, its pattern. ``more`` is what `Sight` takes, ``place`` included.
      plain: the mixer is causal, with no window and no tree of its own.
      below: what the layer below handed up (`CacheState.handed`); None where blocks run alone.
    """

    q: Float[Array, "b t h p"]
    k: Float[Array, "b t g p"]
    v: Float[Array, "b t g p"]
    positions: Int[Array, "#b t"]
    place: Int[Array, "t"]
    real: Bool[Array, "b t"] | None
    turn: Callable[..., Array]
    mix: Callable[..., tuple[Array, Array]]
    plain: bool = True
    below: Mapping[str, Array] | None = None

    @property
    def mask(self) -> Bool[Array, "b t"]:
        """``real``, all True where None."""
        return jnp.ones(self.q.shape[:2], bool) if self.real is None else self.real

    def own_place(self) -> Int[Array, "b t"]:
        """``place`` of real positions, -1 for padding."""
        return jnp.where(self.mask, self.place[None], -1)

    def turned(self) -> tuple[Float[Array, "b t h p"], Float[Array, "b t g p"]]:
        """Queries and keys with their positions."""
        return self.turn(self.q, self.positions), self.turn(self.k, self.positions)

    def check_plain(self, policy: Any) -> None:
        """Refuses what a policy that forgets or selects cannot honour.

        Raises:
          DyncompError: names the fix.
        """
        if not self.plain:
            raise DyncompError(
                f"{type(policy).__name__} goes with causal attention, window=None and without a tree; use FullCache"
            )


@dataclasses.dataclass(frozen=True)
class Work:
    """What a pass cost.

    Attributes:
      pairs: int32 [], query-key pairs computed for each sequence (a head's; heads differ at most in which).
      needed: int32 [b], those asked for; None where dense attention over all that was seen is.
      scored: int32 [], keys, or summaries of keys, that all heads were scored against to choose, for each sequence;
        None for a policy that never chooses.
    """

    pairs: Array
    needed: Array | None = None
    scored: Array | None = None


def in_chunks(
    asked: Asked, size: int, state: Any, step: Callable[[Any, Asked], tuple[Any, Array, Work]]
) -> tuple[Any, Float[Array, "b t h p"], Work]:
    """``step`` over pieces of at most ``size`` positions, in order; each sees the state that the one before left.

    Passes of more than ``size`` positions are padded to whole pieces, and the work of padding counts; a state that
    counts places must be given the right count afterwards.
    """
    t = asked.q.shape[1]
    if t <= size:
        return step(state, asked)
    pieces, extra = -(-t // size), -t % size
    b = asked.q.shape[0]

    def split(x: Array, fill: Any) -> Array:
        x = jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    parts = (
        *(split(x, 0) for x in (asked.q, asked.k, asked.v, asked.positions)),
        split(asked.mask, False),
        asked.place[0] + jnp.arange(pieces * size, dtype=jnp.int32).reshape(pieces, size),
    )

    def one(state: Any, part: Any) -> tuple[Any, Any]:
        q, k, v, positions, real, place = part
        mix = functools.partial(asked.mix, place=place)
        own = {"q": q, "k": k, "v": v, "positions": positions, "place": place, "real": real}
        piece = dataclasses.replace(asked, mix=mix, **own)
        state, mixed, work = step(state, piece)
        return state, (mixed, work.pairs, work.needed, work.scored)

    state, (mixed, pairs, *counts) = lax.scan(one, state, parts)
    total = lambda x: jnp.sum(x, axis=0, dtype=jnp.int32)
    rest = [None if x is None else total(x) for x in counts]
    mixed = jnp.moveaxis(mixed, 0, 1).reshape(b, pieces * size, *mixed.shape[3:])
    return state, mixed[:, :t], Work(total(pairs), *rest)


def dense_pairs(
    asked: Asked, seen: Int[Array, "b"], most: Int[Array, ""] | int | None = None
) -> Int[Array, "b"]:
    """Pairs that real new positions need behind ``seen`` earlier ones, each at most ``most``."""
    rank = jnp.cumsum(asked.mask, axis=1, dtype=jnp.int32) + seen[:, None]
    rank = rank if most is None else jnp.minimum(rank, most)
    return jnp.sum(jnp.where(asked.mask, rank, 0), axis=1, dtype=jnp.int32)


def put(x: Array, at: Int[Array, "b"], new: Array) -> Array:
    """``x`` [b s ...] with one slot of each row replaced by ``new`` [b ...], in place where it is donated."""

    def row(x: Array, at: Array, new: Array) -> Array:
        return lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), at, 0)

    return jax.vmap(row)(x, at, new)


def pick(x: Array, index: Int[Array, "b m"]) -> Array:
    """Slots of each row: [b s ...] -> [b m ...]."""
    return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="clip"))(x, index)
