"""Named shapes and loads that tests and benchmarks share."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: rows [m k], weights [e k n] and how many rows each group has (sum <= m)."""

    name: str
    m: int
    k: int
    n: int
    sizes: tuple[int, ...]


def dirichlet4(total: int, groups: int, seed: int = 0) -> tuple[int, ...]:
    """Group sizes that add up to ``total``, drawn from a Dirichlet(4) multinomial."""
    rng = np.random.default_rng(seed)
    return tuple(int(s) for s in rng.multinomial(total, rng.dirichlet([4.0] * groups)))


SMALL = (
    Case("even", 64, 6, 5, (16, 16, 16, 16)),
    Case("dirichlet4", 100, 6, 5, dirichlet4(100, 4)),
    Case("one_hot", 50, 6, 5, (0, 0, 50, 0)),
    Case("empty_groups", 45, 6, 5, (0, 33, 0, 7)),
    Case("unused_rows", 70, 6, 5, (17, 1, 0, 20)),
    Case("all_empty", 20, 6, 5, (0, 0, 0, 0)),
    Case("zero_rows", 0, 6, 5, (0, 0, 0, 0)),
    Case("one_group", 40, 6, 5, (40,)),
)
"""Small enough for every form, float64 and finite differences."""

LANES = (
    Case("even", 512, 128, 256, (128,) * 4),
    Case("tails", 600, 256, 128, (0, 500, 7, 0)),
    Case("all_empty", 256, 128, 128, (0, 0, 0)),
    Case("one_hot", 300, 128, 128, (0, 300)),
)
"""Multiples of 128, as TPU kernels want them."""

LARGE = (
    Case("even", 4096, 256, 256, (512,) * 8),
    Case("dirichlet4", 4096, 256, 256, dirichlet4(4096, 8)),
    Case("one_hot", 4096, 256, 256, (4096,) + (0,) * 7),
    Case("empty_groups", 4096, 256, 256, (2048, 0, 0, 1024, 0, 0, 512, 512)),
)
"""What the benchmark times."""
