"""From (source, seed, step) to batches: order and background reading by grain, no state but the step."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.tasks.base import Source


class Loader:
    """Batches of a source; the examples of batch t are a pure function of (seed, t).

    Every epoch visits each example once, in its own order. A process reads its slice of the global batch, so the
    number of processes may change between runs.

    Args:
      source: random access to one split.
      seed: of the order.
      batch_size: global batch.
      process_index, process_count: which slice this process reads.
      workers: threads that read ahead.
      ahead: batches read ahead.
    """

    def __init__(
        self,
        source: Source,
        *,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 1,
        ahead: int = 4,
    ):
        if not 1 <= batch_size <= len(source):
            raise DyncompError(
                f"batch_size={batch_size} of {len(source)} examples: use 1..{len(source)}"
            )
        if batch_size % process_count:
            raise DyncompError(
                f"batch_size={batch_size} is not a multiple of {process_count} processes"
            )
        self.source, self.batch_size = source, batch_size
        self.order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        self.slice = (process_index, process_count)
        self.workers, self.ahead = workers, ahead

    def indices(self, step: int) -> np.ndarray:
        """Which examples batch ``step`` holds (this process's slice), int64."""
        index, processes = self.slice
        each = self.batch_size // processes
        start = step * self.batch_size + index * each
        return np.asarray(
            [self.order[position] for position in range(start, start + each)], np.int64
        )

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
    source: Source, batch_size: int, limit: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """All examples in order, in batches of one size; the last is filled up with repeats of mask 0.

    Args:
      source: random access to one split.
      batch_size: of every batch.
      limit: at most this many batches.
    """
    total = len(source)
    batches = -(-total // batch_size)
    for number in range(batches if limit is None else min(limit, batches)):
        index = np.arange(number * batch_size, (number + 1) * batch_size)
        batch = source.batch(np.minimum(index, total - 1))
        real = (index < total).astype(np.float32)
        batch["mask"] = batch["mask"] * real.reshape(-1, *[1] * (batch["mask"].ndim - 1))
        yield batch
