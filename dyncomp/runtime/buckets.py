"""How many rows to run at once: a few compiled sizes, and the split of any number of rows into them."""

import functools

from dyncomp.core.errors import DyncompError


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... and ``limit`` itself."""
    if limit < 1:
        raise DyncompError(f"{limit} rows: a batch has at least one")
    sizes = {1 << i for i in range(limit.bit_length()) if 1 << i < limit}
    return tuple(sorted(sizes | {limit}))


def launch_costs(buckets: tuple[int, ...], launch: int = 4) -> tuple[float, ...]:
    """Cost of one launch of each size where nothing was measured: its rows plus ``launch`` rows.

    So 22 rows become 16 + 8 rather than one padded 32 (36 against 32) or the exact 16 + 4 + 2 (34).
    """
    return tuple(float(size + launch) for size in buckets)


@functools.cache
def split(rows: int, buckets: tuple[int, ...], costs: tuple[float, ...]) -> tuple[int, ...]:
    """Bucket sizes, largest first, that hold ``rows`` rows at the least cost.

    Args:
      rows: >= 0.
      buckets: ascending sizes that are compiled.
      costs: of one launch of each.
    """
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for need in range(1, rows + 1):
        options = []
        for size, cost in zip(buckets, costs, strict=True):
            price, chosen = best[max(0, need - size)]
            options.append((price + cost, chosen + (size,)))
        best.append(min(options, key=lambda option: option[0]))
    return tuple(sorted(best[rows][1], reverse=True))
