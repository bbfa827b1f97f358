"""From (source, seed, step) to batches: background reading by grain, no state but the step."""

import functools
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.tasks.base import Source


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch, int64 [count]: the ranks of ``count`` words of Philox keyed by (seed, epoch).

    The bit generator's raw words are the same in every NumPy release (its ``permutation`` need not be). grain's
    own shuffle costs 20 us an example here, 0.6 ms for a batch of 32.
    """
    order = np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


class Loader:
    """Batches of a source; the examples of batch t are a pure function of (seed, t).

    Every epoch visits each example once, in its own order. A process reads its rows of the global batch, so the
    number of processes may change between runs.

    Args:
      source: random access to one split.
      seed: of the order.
      batch_size: global batch.
      rows: which rows of each global batch this process reads (`dyncomp.parallel.process_rows`); default all.
      shuffle: a new order each epoch; False keeps the source's order.
      workers: threads that read ahead.
      ahead: batches read ahead.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        rows: np.ndarray | None = None,
        shuffle: bool = True,
        workers: int = 1,
        ahead: int = 4,
    ):
        if len(source) == 0:
            raise DyncompError("the split holds no example: check the task's data")
        if not 1 <= batch_size <= len(source):
            raise DyncompError(
                f"batch_size={batch_size} of {len(source)} examples: use 1..{len(source)}"
            )
        if seed < 0:
            raise DyncompError(f"seed={seed}: use 0 or more")
        self.source, self.batch_size = source, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.rows = np.arange(batch_size) if rows is None else rows
        self.workers, self.ahead = workers, ahead

    def indices(self, step: int) -> np.ndarray:
        """Which examples batch ``step`` holds (this process's rows), int64."""
        epochs, places = np.divmod(step * self.batch_size + self.rows, len(self.source))
        if not self.shuffle:
            return places
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):  # one or two: a batch is no larger than an epoch
            here = epochs == epoch
            found[here] = epoch_order(self.seed, int(epoch), len(self.source))[places[here]]
        return found

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Batch ``step``."""
        return self.source.batch(self.indices(step))

    def iterate(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Batches start .. stop - 1, read ahead in the background."""
        if stop <= start:
            return iter(())
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        read = grain.ReadOptions(num_threads=self.workers, prefetch_buffer_size=self.ahead)
        return iter(steps.to_iter_dataset(read))


def sequential(
    source: Source, batch_size: int, limit: int | None = None, rows: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """All examples in order, in batches of one size; the last is filled up with repeats of mask 0.

    Args:
      source: random access to one split.
      batch_size: of every batch.
      limit: at most this many batches.
      rows: which rows of each batch are read; default all.
    """
    rows = np.arange(batch_size) if rows is None else rows
    total = len(source)
    batches = -(-total // batch_size)
    for number in range(batches if limit is None else min(limit, batches)):
        index = number * batch_size + rows
        batch = source.batch(np.minimum(index, total - 1))
        real = (index < total).astype(np.float32)
        batch["mask"] = batch["mask"] * real.reshape(-1, *[1] * (batch["mask"].ndim - 1))
        yield batch
