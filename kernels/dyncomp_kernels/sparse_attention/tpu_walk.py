"""TPU: goes through one list after the other, and copies what the next steps read while a step computes.

A list is in scalar memory only while its block is at work, and the next one's beside it::

    lists     | 7 2 0 4 5 . . |  the count, then the entries; two rows of scalar memory
    a step    | 2 0 4 5 |        up to `Steps.wide` entries, copied one by one behind one another
    computed  | 2 0 4 5 |        in one piece, or where fewer are left, in pieces of `Steps.narrow` and of one entry
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PIECE = 512
"""Rows and columns of scores at a time; two after one another fill the matrix units."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """How many entries are at work at once.

    Attributes:
      size: places of an entry, along the list.
      wide: entries of a step.
      narrow: entries of a piece.
    """

    size: int
    wide: int
    narrow: int

    @classmethod
    def of(cls, size: int, longest: int) -> "Steps":
        """For entries of ``size`` places and lists of up to ``longest`` of them."""
        narrow = max(1, min(PIECE // size, longest))
        return cls(size, min(2 * narrow, max(longest, 1)) // narrow * narrow, narrow)

    @property
    def places(self) -> int:
        """Places of a step."""
        return self.wide * self.size

    @property
    def sizes(self) -> list[int]:
        """Entries of the pieces that a step may consist of, the largest first."""
        return sorted({self.wide, self.narrow, 1}, reverse=True)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a list's entries name.

    Attributes:
      own, after: in slow memory, what entries of this list and of the next one are blocks of.
      buffer: [2 ..], room for two steps.
      semaphore: [2], counts what has come.
      cut: (own or after, entry) -> the entry's block.
      put: (room for a step, number in it) -> where the block goes.
    """

    own: Any
    after: Any
    buffer: Any
    semaphore: Any
    cut: Callable[[Any, Array], Any]
    put: Callable[[Any, int], Any]

    def copy(self, whole: Any, entry: Array, slot: Array, at: int) -> Any:
        """The copy of one entry to the place ``at`` of a step."""
        into = self.put(self.buffer.at[slot], at)
        return pltpu.make_async_copy(self.cut(whole, entry), into, self.semaphore.at[slot])


def walk(
    own: Any,
    after: Any,
    first: Array,
    last: Array,
    state: Any,
    sources: Sequence[Source],
    steps: Steps,
    piece: Callable[[Array, int, int, list[Array]], None],
) -> None:
    """Calls ``piece`` for all entries of a list.

    Args:
      own, after: rows of scalar memory [1 1+m]: this list and the next one, which may be copied for already.
      first, last: whether a chain of lists begins and ends here.
      state: int32 [2] in scalar memory, kept along the chain: the slot of the next step, and whether it is on its way.
      piece: (slot, number of the first entry in the step, entries, their values).
    """
    count = own[0, 0]
    total = lax.div(count + (steps.wide - 1), steps.wide)

    @pl.when(first)
    def _():
        state[0], state[1] = jnp.int32(0), jnp.int32(0)

    def each(row: Any, step: Array, slot: Array, act: Callable[[Any], None]) -> None:
        for at in range(steps.wide):
            number = step * steps.wide + at

            @pl.when(number < row[0, 0])
            def _(at=at, number=number):
                entry = row[0, 1 + number]
                for source in sources:
                    whole = source.after if row is after else source.own
                    act(source.copy(whole, entry, slot, at))

    start = lambda copy: copy.start()

    @pl.when((total > 0) & (state[1] == 0))
    def _():
        each(own, jnp.int32(0), state[0], start)

    @pl.when(total > 0)
    def _():
        follows = jnp.logical_not(last) & (after[0, 0] > 0)
        slot_of = lambda step: lax.rem(state[0] + step, 2)

        def run(step: Array, _: None) -> None:
            slot = slot_of(step)

            @pl.when(step + 1 < total)
            def _():
                each(own, step + 1, 1 - slot, start)

            @pl.when((step + 1 == total) & follows)
            def _():
                each(after, jnp.int32(0), 1 - slot, start)

            each(own, step, slot, lambda copy: copy.wait())
            _pieces(own, step, slot, count - step * steps.wide, steps, piece)

        lax.fori_loop(0, total, run, None)
        state[0] = slot_of(total)
        state[1] = follows.astype(jnp.int32)


def _pieces(own: Any, step: Array, slot: Array, left: Array, steps: Steps, piece: Any) -> None:
    """A whole step in one piece, else in the largest that fit."""

    def at(begin: Any, size: int) -> None:
        number = 1 + step * steps.wide + begin
        piece(slot, begin, size, [own[0, number + i] for i in range(size)])

    whole, *smaller = steps.sizes

    @pl.when(left >= whole)
    def _():
        at(0, whole)

    if not smaller:
        return

    @pl.when(left < whole)
    def _():
        done = jnp.int32(0)
        for size in smaller:
            times = lax.div(left - done, size)
            lax.fori_loop(0, times, lambda i, _, d=done, z=size: at(d + i * z, z), None)
            done = done + times * size
