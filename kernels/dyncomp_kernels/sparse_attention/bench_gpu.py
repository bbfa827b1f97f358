"""Milliseconds on a GPU beside dense rivals: ``python -m dyncomp_kernels.sparse_attention.bench_gpu [--json FILE]``.

bfloat16, head 128, 16 query heads on 4 key/value heads, batch 1. Every key/value head lists random causal blocks, the
diagonal always. Ideal is the time of cuDNN's dense causal attention times the share of causal blocks that is listed.
Needs jax on a GPU; PyTorch's rivals are measured where it is installed.
"""

import argparse
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp_kernels.sparse_attention.api import sparse_attention
from dyncomp_kernels.sparse_attention.lists import BlockLists, blocks_of, lists_of

HEADS, GROUPS, WIDTH, TILE = 16, 4, 128, 128
LENGTHS, SHARES = (8192, 32_768, 131_072), (0.05, 0.1, 0.25, 1.0)
FLEX_UP_TO, TOKENS = 32_768, 32_768
"""Longest input of flex_attention; queries of all problems of a program, so that the GPU never waits for the host."""


def random_causal(length: int, share: float) -> BlockLists:
    """A share of the causal blocks for each key/value head."""
    blocks = blocks_of(length, TILE)
    causal = np.tril(np.ones((blocks, blocks), bool))
    chosen = np.random.default_rng(0).random((1, GROUPS, blocks, blocks)) < share
    chosen = (chosen | np.eye(blocks, dtype=bool)) & causal
    longest = int(chosen.sum(-1).max())
    return lists_of(jnp.asarray(chosen), TILE, TILE, longest)


def milliseconds(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median of nine, of a few calls each, after two that are not counted."""
    wait(call()), wait(call())
    begin = time.perf_counter()
    wait(call())
    turns = max(1, min(20, int(0.05 / max(time.perf_counter() - begin, 1e-6))))
    found = []
    for _ in range(9):
        begin = time.perf_counter()
        for _ in range(turns - 1):
            call()
        wait(call())
        found.append((time.perf_counter() - begin) / turns)
    return 1e3 * float(np.median(found))


def jax_rows(length: int) -> list[dict[str, Any]]:
    """cuDNN's dense causal attention, ours by share, forward and with gradients of given cotangents."""
    heads = HEADS, GROUPS, GROUPS, HEADS
    draw = lambda key, n: jax.random.normal(key, (1, length, n, WIDTH), jnp.bfloat16)
    seeds = jax.random.split(jax.random.key(0), max(1, TOKENS // length))
    problems = [tuple(map(draw, jax.random.split(seed, 4), heads)) for seed in seeds]
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

    def pulled(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k, v, d_out, *lists: jax.vjp(lambda *x: fn(*x, *lists), q, k, v)[1](d_out)

    def time_of(fn: Callable[..., Any], *lists: Any) -> dict[str, float]:
        """Of one problem; a program computes all of them, each with lists in memory of their own."""
        given = [(*p, *jax.tree.map(jnp.copy, lists)) for p in problems]
        parts = {
            "forward_ms": lambda q, k, v, _, *lists: fn(q, k, v, *lists),
            "both_ms": pulled(fn),
        }
        found = {}
        for name, part in parts.items():
            one = jax.jit(part)
            call = functools.partial(
                jax.jit(lambda given, one=one: [one(*x) for x in given]), given
            )
            found[name] = milliseconds(call, jax.block_until_ready) / len(problems)
        return found

    row = {"length": length, "form": "cudnn", "share": 1.0}
    base = time_of(dense)
    rows, blocks = [{**row, **base}], blocks_of(length, TILE)
    own = lambda q, k, v, lists: sparse_attention(q, k, v, lists)[0]
    for share in SHARES:
        lists = random_causal(length, share)
        listed = float(jnp.sum(lists.count)) / GROUPS / (blocks * (blocks + 1) / 2)
        found = time_of(own, lists)
        ideal = {f"{name}_of_ideal": base[name] * listed / found[name] for name in base}
        rows.append({"length": length, "form": "ours", "share": listed, **found, **ideal})
    return rows


def torch_rows(length: int) -> list[dict[str, Any]]:
    """PyTorch's causal attention, and its flex_attention with our block masks; forward."""
    import torch  # pyrefly: ignore
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # pyrefly: ignore

    shape = lambda n: (1, n, length, WIDTH)
    q, k, v = (
        torch.randn(shape(n), dtype=torch.bfloat16, device="cuda") for n in (HEADS, GROUPS, GROUPS)
    )
    wait = lambda _: torch.cuda.synchronize()
    attend = torch.nn.functional.scaled_dot_product_attention
    dense = lambda: attend(q, k, v, is_causal=True, enable_gqa=True)
    rows = [
        {"length": length, "form": "sdpa", "share": 1.0, "forward_ms": milliseconds(dense, wait)}
    ]
    if length > FLEX_UP_TO:
        return rows
    flex = torch.compile(flex_attention)
    for share in SHARES:
        lists = random_causal(length, share)
        index, count = (np.asarray(x).astype(np.int32) for x in (lists.index, lists.count))
        blocks = blocks_of(length, TILE)
        wide = np.zeros((1, GROUPS, blocks, blocks), np.int32)
        wide[..., : index.shape[-1]] = index
        repeat = lambda x: torch.from_numpy(np.repeat(x, HEADS // GROUPS, axis=1)).cuda()
        mask = BlockMask.from_kv_blocks(
            repeat(count),
            repeat(wide),
            BLOCK_SIZE=TILE,
            mask_mod=lambda b, h, i, j: i >= j,
            seq_lengths=(length, length),
        )
        call = lambda mask=mask: flex(q, k, v, block_mask=mask, enable_gqa=True)
        listed = float(count.sum()) / GROUPS / (blocks * (blocks + 1) / 2)
        found = {"forward_ms": milliseconds(call, wait)}
        rows.append({"length": length, "form": "flex", "share": listed, **found})
    return rows


def main() -> None:
    """A line a row; with ``--json`` all of them in a file too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for length in asked.lengths:
        for part in (jax_rows, torch_rows) if importlib.util.find_spec("torch") else (jax_rows,):
            try:
                found = part(length)
            except Exception as error:  # another rival, another length may still run
                found = [{"length": length, "form": part.__name__, "failed": str(error)[:300]}]
            rows += found
            for row in found:
                print(json.dumps(row), flush=True)
    if asked.json:
        device = jax.devices()[0].device_kind
        asked.json.write_text(json.dumps({"device": device, "jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
