"""How many rows to run at once: a few compiled sizes, and the split of any number of rows into them."""

import functools

from dyncomp.core.errors import DyncompError


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... and ``limit`` itself."""
    if limit < 1:
        raise DyncompError(f"{limit} rows: a batch has at least one")
    sizes = {1 << i for i in range(limit.bit_length()) if 1 << i < limit}
    return tuple(sorted(sizes | {limit}))


@functools.cache
def split(rows: int, buckets: tuple[int, ...], launch: int = 4) -> tuple[int, ...]:
    """Bucket sizes, largest first, that hold ``rows`` rows at the least cost.

    The cost of a launch is its size plus ``launch`` rows, so 22 rows become 16 + 8 rather than one padded 32 (36
    against 32) or the exact 16 + 4 + 2 (34).

    Args:
      rows: >= 0.
      buckets: ascending sizes that are compiled.
      launch: fixed cost of one launch, in rows.
    """
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for need in range(1, rows + 1):
        options = []
        for size in buckets:
            price, chosen = best[max(0, need - size)]
            options.append((price + size + launch, chosen + (size,)))
        best.append(min(options, key=lambda option: option[0]))
    return tuple(sorted(best[rows][1], reverse=True))
