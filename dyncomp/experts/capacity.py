"""How many rows an expert may take: the formulas in use, as Python integers."""

import math
from collections.abc import Sequence
from typing import Literal

Rounding = Literal["up", "down", "nearest"]
_ROUND = {"up": math.ceil, "down": math.floor, "nearest": round}


def slots_per_expert(
    rows: int,
    experts: int,
    k: int,
    factor: float,
    *,
    counts_k: bool = True,
    rounding: Rounding = "up",
    multiple: int = 1,
) -> int:
    """round(k * rows * factor / experts), at least 1, then up to a multiple.

    The same factor means different things: V-MoE (rounding "up", multiple 4) counts the k choices of a row; Switch,
    ST-MoE and flaxformer do not (``counts_k=False``, "nearest", half to even), so that their 2.5 for top-2 is our 1.25.

    Args:
      rows: rows that share the capacity.
      experts: e.
      k: choices of a row.
      factor: 1 is an even share.
    """
    share = (k if counts_k else 1) * rows * factor / experts
    slots = max(1, _ROUND[rounding](share))
    return -(-slots // multiple) * multiple


def tutel_slots(
    rows: int, experts: int, k: int, factor: float, most: int, multiple: int = 1
) -> int:
    """Capacity as Tutel's code has it (arXiv 2206.03382).

    factor > 0: k * int(factor * ceil(rows / experts)), at least 1. 0: ``most``, the largest load (nothing is dropped).
    Below 0: the largest load, but no more than |factor| gives. Then up to the multiple.
    """
    even = -(-rows // experts)
    fixed = max(1, k * int(abs(factor) * even))
    slots = fixed if factor > 0 else max(1, most) if factor == 0 else max(1, min(most, fixed))
    return -(-slots // multiple) * multiple


def heterogeneous_slots(
    assignments: int, weights: Sequence[float], factor: float
) -> tuple[int, ...]:
    """factor * w_i * assignments / sum of w for each expert, rounded up (MoE++, arXiv 2410.07348, eq. 8).

    The paper prints tokens where ``assignments`` = k * tokens stands here: as printed nearly half of all choices of a
    top-2 router would be dropped.
    """
    total = sum(weights)
    return tuple(max(1, math.ceil(factor * assignments * w / total)) for w in weights)
