"""Milliseconds of the portable form at 8192 tokens: ``python -m dyncomp_kernels.sparse_attention.bench``.

One line of JSON a share of the causal blocks: listed blocks, milliseconds, and with PyTorch its causal SDPA.
"""

import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import (
    BlockLists,
    blocks_of,
    causal_lists,
    lists_of,
    table_of,
)

LENGTH, HEADS, GROUPS, WIDTH = 8192, 9, 3, 64
ROWS, COLUMNS, TURNS = 128, 128, 5
SHARES = (0.05, 0.1, 0.25, 1.0)


def random_causal(length: int, share: float, seed: int = 0) -> BlockLists:
    """A share of the causal blocks a key/value head, the diagonal always."""
    blocks = blocks_of(length, ROWS)
    causal = np.asarray(table_of(causal_lists(length, length, ROWS, COLUMNS), blocks))[0, 0]
    chosen = np.random.default_rng(seed).random((1, GROUPS, blocks, blocks)) < share
    return lists_of(jnp.asarray((chosen | np.eye(blocks, dtype=bool)) & causal), ROWS, COLUMNS)


def median(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    call()
    found = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(found))


def main() -> None:
    """Prints the lines."""
    rng = np.random.default_rng(0)
    shapes = [(1, LENGTH, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    sdpa = _sdpa(q, k, v) if importlib.util.find_spec("torch") else None
    given = [jnp.asarray(x) for x in (q, k, v)]
    call = jax.jit(lambda q, k, v, lists: sparse_attention(q, k, v, lists)[0])
    for share in SHARES:
        lists = random_causal(LENGTH, share)
        ours = median(lambda lists=lists: jax.block_until_ready(call(*given, lists)))
        line = {"share": share, "blocks": int(lists.listed), "ms": round(ours, 1)}
        print(
            json.dumps({**line, **({"sdpa_ms": round(median(sdpa), 1)} if sdpa else {})}),
            flush=True,
        )


def _sdpa(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Callable[[], Any]:
    import torch  # pyrefly: ignore

    first, keys, values = (torch.from_numpy(x.swapaxes(1, 2).copy()) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(first, keys, values, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    main()
