"""Choosing an `Exchange` by load, from measured times: host-side Python, nothing of it is traced.

Parameters lie the same way under every `Exchange`, so following one compiled step by another moves no weight: the
switch costs nothing but the first compilation (Hwang et al. 2023, arXiv 2206.03382, sec. 3.3).
"""

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax

from dyncomp.core.errors import DyncompError
from dyncomp.experts.exchange import Exchange

Search = Generator[Exchange, float, Exchange]


def search(slices: Sequence[int], chunks: Sequence[int], inner: Sequence[int]) -> Search:
    """Yields settings to try, is sent their seconds, returns the fastest.

    First a ternary search over ``slices``, whose cost falls and then rises along it (weights move less, rows more);
    then every pair of ``chunks`` and ``inner`` at the best of them.
    """
    times: dict[Exchange, float] = {}

    def timed(setting: Exchange) -> Generator[Exchange, float, float]:
        if setting not in times:
            times[setting] = yield setting
        return times[setting]

    first = lambda r: Exchange(slices=r, chunks=chunks[0], inner=inner[0])
    low, high = 0, len(slices) - 1
    while high - low > 2:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        before = yield from timed(first(slices[left]))
        after = yield from timed(first(slices[right]))
        low, high = (low, right - 1) if before <= after else (left + 1, high)
    for r in slices[low : high + 1]:
        yield from timed(first(r))
    best = min(times, key=lambda setting: times[setting])
    if best.slices != 0:  # without rows that move there is nothing to cut or to route
        for d, near in itertools.product(chunks, inner):
            yield from timed(Exchange(slices=best.slices, chunks=d, inner=near))
    return min(times, key=lambda setting: times[setting])


class ExchangeChooser:
    """Which `Exchange` is fastest at which capacity, found out while training goes on.

    Capacities are told apart by ``capacity // bucket``; each such key has a search of its own, which starts when the
    key is first met.

    Args:
      slices: r to choose among, in order; see `Exchange`. 0 is data parallelism.
      chunks: d to choose among.
      inner: ways to send; (1,) for the plain all-to-all, (1, 8) to try two steps between groups of 8 too.
      bucket: capacities that are taken for the same.
    """

    def __init__(
        self,
        slices: Sequence[int] = (0, 1),
        chunks: Sequence[int] = (1, 2, 4, 8),
        inner: Sequence[int] = (1,),
        bucket: int = 128,
    ):
        if not slices or not chunks or not inner or bucket < 1:
            raise DyncompError(
                "ExchangeChooser: give at least one of each, and a bucket of 1 or more"
            )
        self._given = tuple(slices), tuple(chunks), tuple(inner)
        self.bucket = bucket
        self.best: dict[int, Exchange] = {}
        self._open: dict[int, tuple[Search, Exchange]] = {}

    def key(self, capacity: int) -> int:
        """Which capacities it stands with."""
        return capacity // self.bucket

    def slots(self, capacity: int) -> int:
        """The capacity to compile for: enough for all of the key, so that there are few programs."""
        return (self.key(capacity) + 1) * self.bucket

    def propose(self, capacity: int) -> Exchange:
        """What to use now: the next to be tried or, when all were, the best."""
        key = self.key(capacity)
        if key in self.best:
            return self.best[key]
        if key not in self._open:
            trial = search(*self._given)
            self._open[key] = (trial, next(trial))
        return self._open[key][1]

    def record(self, capacity: int, setting: Exchange, seconds: float) -> None:
        """Tells how long a step took; only the setting on trial is listened to."""
        key = self.key(capacity)
        if key in self.best or key not in self._open or self._open[key][1] != setting:
            return
        trial = self._open[key][0]
        try:
            self._open[key] = (trial, trial.send(seconds))
        except StopIteration as done:
            self.best[key] = done.value
            del self._open[key]


class SwitchingStep:
    """A step that is compiled for several `Exchange`s and runs the one the chooser proposes.

    Args:
      make: (exchange, slots) -> the step; called once for each pair that is met. All of them must take and return
        arrays that lie the same way (`MoE.exchange` and `MoE.capacity_slots` are all that differs).
      chooser: asked before and told after each call.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        make: Callable[[Exchange, int], Callable[..., Any]],
        chooser: ExchangeChooser,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.make, self.chooser, self.clock = make, chooser, clock
        self.steps: dict[tuple[Exchange, int], Callable[..., Any]] = {}
        self.last: Exchange | None = None

    def __call__(self, capacity: int, *args: Any) -> Any:
        """Runs the step for the largest load seen of late.

        Once the key of that load is settled nothing is timed and nothing waited for. Before, each program's first call,
        which compiles it, is not timed.
        A load above ``chooser.slots(capacity)`` is dropped and counted by the layer, as under any capacity.
        """
        setting, slots = self.chooser.propose(capacity), self.chooser.slots(capacity)
        fresh = (setting, slots) not in self.steps
        if fresh:
            self.steps[setting, slots] = self.make(setting, slots)
        self.last, start = setting, self.clock()
        result = self.steps[setting, slots](*args)
        if not fresh and self.chooser.key(capacity) not in self.chooser.best:
            jax.block_until_ready(result)
            self.chooser.record(capacity, setting, float(self.clock() - start))
        return result
