"""`dyncomp bench attention`: attention over listed blocks against dense rivals, and what prefill and decode save.

Kernel rows: batch 1, nine query heads on three key/value heads of 64, float32, all cores on both sides; every key/value
head lists random causal blocks of its own, the diagonal always. Prefill and decode rows are of SmolLM2-135M where
``DYNCOMP_SMOLLM2`` names its file, else of random weights of its shape.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.bench import attention_decode, attention_peer, fresh, timing
from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import (
    BlockLists,
    blocks_of,
    causal_lists,
    lists_of,
    table_of,
)

LENGTH, HEADS, GROUPS, WIDTH, TILE = 8192, 9, 3, 64, 128
PAIRS, FEW = 12, 6
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
RIVALS = {"sdpa": (0.1, 4.0), "flex": (0.1, 1.2), "jax_dense": (0.1, 12.0), "sdpa_all": (1.0, 0.5)}
"""Rival -> share of the causal blocks that ours lists, and the least ratio asked."""
AGAINST = {
    "sdpa": "seconds of PyTorch's causal scaled_dot_product_attention / ours; {s} tokens, a tenth of the causal blocks",
    "flex": "seconds of PyTorch's compiled flex_attention with the same block mask / ours; {s} tokens, a tenth",
    "jax_dense": "seconds of dense causal attention in JAX by blocks of queries / ours; {s} tokens, a tenth",
    "sdpa_all": "seconds of PyTorch's causal scaled_dot_product_attention / ours; {s} tokens, all causal blocks",
}
LINEAR = "R^2 of a straight line through seconds by listed blocks, shares " + ", ".join(
    f"{share:g}" for share in SHARES
)
MEMORY = "bytes of temporaries and outputs of twice the tokens / bytes, as compiled, a tenth of the blocks"


def rows(quick: bool) -> list[dict[str, Any]]:
    """Rows of the kernel, of prefill and of decode; rivals of PyTorch only where it is installed."""
    length = 512 if quick else LENGTH
    torch = attention_peer.available() and not quick
    found = [_rival(name, length, quick) for name in RIVALS if name == "jax_dense" or torch]
    found += [_linear(length, quick), _memory(length)]
    return found + attention_decode.rows(quick)


def random_causal(length: int, share: float, seed: int = 0) -> BlockLists:
    """A share of the causal blocks for each key/value head, the diagonal always; exactly so many, up to rounding."""
    blocks = blocks_of(length, TILE)
    causal = np.asarray(table_of(causal_lists(length, length, TILE, TILE), blocks))[0, 0]
    rng, chosen = np.random.default_rng(seed), np.zeros((1, GROUPS, blocks, blocks), bool)
    below = np.argwhere(causal & ~np.eye(blocks, dtype=bool))
    wanted = max(round(share * causal.sum()) - blocks, 0)
    for group in range(GROUPS):
        rows, columns = below[rng.permutation(len(below))[:wanted]].T
        chosen[0, group, rows, columns] = True
    return lists_of(jnp.asarray(chosen | np.eye(blocks, dtype=bool)), TILE, TILE)


def inputs(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random queries, keys and values [1 t h p]."""
    rng = np.random.default_rng(0)
    shapes = [(1, length, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return q, k, v


def ours(length: int, share: float) -> tuple[Callable[[], Any], BlockLists]:
    """A call over listed blocks, and its lists."""
    given, lists = [jnp.asarray(x) for x in inputs(length)], random_causal(length, share)
    call = jax.jit(lambda q, k, v, lists: sparse_attention(q, k, v, lists)[0])
    return lambda: jax.block_until_ready(call(*given, lists)), lists


def jax_dense(length: int, rows_at_once: int = 512) -> Callable[[], Any]:
    """Dense causal attention as one would write it: blocks of queries against all keys, in a loop."""
    q, k, v = (jnp.asarray(x) for x in inputs(length))
    size = min(rows_at_once, length)

    @jax.jit
    def call(q, k, v):
        split = q.reshape(1, length // size, size, GROUPS, HEADS // GROUPS, WIDTH)

        def block(carry, part):
            rows, start = part
            scores = jnp.einsum("btgrp,bsgp->bgrts", rows, k) / np.sqrt(WIDTH).astype(np.float32)
            seen = jnp.arange(length)[None] <= start + jnp.arange(size)[:, None]
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return carry, jnp.einsum("bgrts,bsgp->btgrp", weights, v)

        parts = jnp.moveaxis(split, 1, 0), jnp.arange(0, length, size)
        return jax.lax.scan(block, 0, parts)[1]

    return lambda: jax.block_until_ready(call(q, k, v))


def pairs(rival: str, length: int, turns: int) -> dict[str, Any]:
    """Pairs of seconds against one rival, and how much was listed."""
    share, _ = RIVALS[rival]
    own, lists = ours(length, share)
    if rival == "jax_dense":
        theirs = jax_dense(length)
    elif rival == "flex":
        blocks = np.asarray(table_of(lists, blocks_of(length, TILE)))
        theirs = attention_peer.flex(*inputs(length), blocks, TILE)
    else:
        theirs = attention_peer.sdpa(*inputs(length))
    found = timing.interleaved(own, theirs, turns)
    return {"pairs": vars(found), "blocks": int(lists.listed)}


def _rival(rival: str, length: int, quick: bool) -> dict[str, Any]:
    turns = 2 if quick else PAIRS
    words = {"rival": rival, "length": length, "turns": turns}
    found = fresh.call(f"{__name__}:pairs", words)
    own = timing.Pairs(**found["pairs"])
    ratio, interval = timing.median_interval([1 / r for r in own.ratios()])
    seconds = own.seconds()
    return timing.row(
        f"attention/{rival}/{length}",
        ratio,
        interval,
        reference=AGAINST[rival].format(s=length),
        runs=turns,
        goal=None if quick else RIVALS[rival][1],
        relation="report" if quick else ">=",
        peer=rival,
        median_ours=seconds[0],
        median_peer=seconds[1],
        blocks=found["blocks"],
    )


def scaling(length: int, turns: int) -> dict[str, list[float]]:
    """Listed blocks and median seconds, by share."""
    blocks, seconds = [], []
    for share in SHARES:
        call, lists = ours(length, share)
        call()
        own: list[float] = []
        for _ in range(turns):
            watch = timing.Stopwatch()
            call()
            watch.stop(own, [])
        blocks.append(float(lists.listed))
        seconds.append(float(np.median(own)))
    return {"blocks": blocks, "seconds": seconds}


def _linear(length: int, quick: bool) -> dict[str, Any]:
    turns = 1 if quick else FEW
    found = fresh.call(f"{__name__}:scaling", {"length": length, "turns": turns})
    x, y = np.asarray(found["blocks"]), np.asarray(found["seconds"])
    slope, start = np.polyfit(x, y, 1)
    left = float(np.sum((y - slope * x - start) ** 2) / np.sum((y - y.mean()) ** 2))
    more = {"microseconds_a_block": 1e6 * float(slope), "milliseconds_at_none": 1e3 * float(start)}
    return timing.row(
        f"attention/linear/{length}", 1 - left, None, reference=LINEAR, runs=turns, **found, **more
    )


@functools.cache
def compiled_bytes(length: int) -> int:
    """Temporaries and outputs of the compiled call, a tenth of the blocks listed."""
    shapes = [
        jax.ShapeDtypeStruct((1, length, heads, WIDTH), jnp.float32)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    lists = random_causal(length, 0.1)
    call = jax.jit(lambda q, k, v, lists: sparse_attention(q, k, v, lists)[0])
    made = call.lower(*shapes, lists).compile().memory_analysis()
    assert made is not None
    return made.temp_size_in_bytes + made.output_size_in_bytes


def _memory(length: int) -> dict[str, Any]:
    one, two = compiled_bytes(length), compiled_bytes(2 * length)
    return timing.row(
        f"attention/memory/{length}",
        two / one,
        [two / one] * 2,
        reference=MEMORY,
        runs=1,
        goal=2.1,
        relation="<=",
        bytes=[one, two],
    )
