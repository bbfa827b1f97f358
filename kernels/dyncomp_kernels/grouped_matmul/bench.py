"""Times the portable form and its rivals against one dense product of equal FLOPs, by process CPU time.

Meant for one pinned thread: ``taskset -c 1 env XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m
dyncomp_kernels.grouped_matmul.bench``. All contestants of a load run in turn, so that a drifting machine hits them
alike. Every ratio is to this library's own dense product, PyTorch's too; "torch_dense" beside it turns those into
ratios to PyTorch's own.
"""

import functools
import importlib.util
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dyncomp_kernels.grouped_matmul.api import grouped_matmul
from dyncomp_kernels.grouped_matmul.cases import dirichlet4
from dyncomp_kernels.grouped_matmul.xla import executed_rows

ROWS, INNER, COLUMNS = 8192, 512, 1024
QUICK = 512, 64, 128
GROUPS = (8, 32, 64)
REPEATS, SLOW_REPEATS = 7, 1
FACTOR = 1.25
"""Capacity of a group as a multiple of an even one; what exceeds it is dropped, so that rival does less."""

Contestants = dict[str, Callable[[], Any]]


def loads(rows: int, groups: int) -> dict[str, tuple[int, ...]]:
    """Group sizes by name: even, Dirichlet(4), all rows in one group."""
    even = tuple(rows // groups for _ in range(groups))
    one = (rows,) + (0,) * (groups - 1)
    return {"even": even, "dirichlet4": dirichlet4(rows, groups), "one_hot": one}


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a load, number of groups, part and contestant.

    Returns:
      dicts: id, ratio (median over the runs of contestant / dense), ratios, seconds (medians of both), executed
      (rows multiplied / rows in use; of the portable form).
    """
    shape = QUICK if quick else (ROWS, INNER, COLUMNS)
    found = []
    for groups in GROUPS[:1] if quick else GROUPS:
        for load, sizes in loads(shape[0], groups).items():
            for part in ("forward", "forward_backward"):
                slow = load == "dirichlet4" and not quick
                measured = _measured(shape, sizes, part, 2 if quick else REPEATS, slow)
                found += _rows(f"grouped_matmul/{load}/{groups}/{part}", measured, sizes)
    return found


def _rows(
    name: str, seconds: dict[str, list[float]], sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    dense = seconds.pop("dense")
    share = int(executed_rows(jnp.asarray(sizes, jnp.int32), sum(sizes))) / sum(sizes)
    found = []
    for contestant, taken in seconds.items():
        ratios = [ours / peer for ours, peer in zip(taken, dense, strict=False)]
        medians = [float(np.median(taken)), float(np.median(dense))]
        row = {"id": f"{name}/{contestant}", "ratio": float(np.median(ratios)), "ratios": ratios}
        found.append(
            {**row, "seconds": medians, "executed": share if contestant == "ours" else None}
        )
    return found


def _measured(shape, sizes, part: str, repeats: int, slow: bool) -> dict[str, list[float]]:
    """CPU seconds of every contestant, in turn; `jax.lax.ragged_dot`, ``slow``, fewer times."""
    contestants = _jax(shape, sizes, part)
    if importlib.util.find_spec("torch"):
        contestants |= _torch(shape, sizes, part)
    if not slow:
        del contestants["ragged_dot"]
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):  # the first warms up
        for name, run in contestants.items():
            if name == "ragged_dot" and turn > SLOW_REPEATS:
                continue
            begin = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - begin)
    return seconds


def _draw(shape, groups: int) -> list[np.ndarray]:
    """Rows [m k], weights [e k n], cotangent [m n], float32."""
    (m, k, n), rng = shape, np.random.default_rng(0)
    return [rng.normal(size=s).astype(np.float32) for s in ((m, k), (groups, k, n), (m, n))]


def _jax(shape, sizes: tuple[int, ...], part: str) -> Contestants:
    x, weights, dy = (jnp.asarray(a) for a in _draw(shape, len(sizes)))
    counts = jnp.asarray(sizes, jnp.int32)

    def run(product: Callable[[Array, Array], Array], w: Array) -> Callable[[], Any]:
        both = lambda x, w, dy: (lambda out, pull: (out, *pull(dy)))(*jax.vjp(product, x, w))
        fn = jax.jit(both if part == "forward_backward" else lambda x, w, dy: product(x, w))
        return lambda: jax.block_until_ready(fn(x, w, dy))

    capacity = functools.partial(_capacity, counts, slots=int(FACTOR * shape[0] / len(sizes)))
    return {
        "dense": run(lambda x, w: x @ w, weights[0]),
        "ours": run(lambda x, w: grouped_matmul(x, w, counts), weights),
        "capacity": run(capacity, weights),
        "ragged_dot": run(lambda x, w: lax.ragged_dot(x, w, counts), weights),
    }


def _capacity(sizes: Array, rows: Array, weights: Array, slots: int) -> Array:
    """Every group padded or cut to ``slots`` rows, one batched product, and the rows back in place."""
    starts = jnp.cumsum(sizes) - sizes
    place = starts[:, None] + jnp.arange(slots)
    kept = jnp.arange(slots) < sizes[:, None]
    padded = jnp.where(kept[..., None], rows[jnp.minimum(place, rows.shape[0] - 1)], 0)
    out = jnp.einsum("eck,ekn->ecn", padded, weights)
    place = jnp.where(kept, place, rows.shape[0]).reshape(-1)
    empty = jnp.zeros((rows.shape[0], out.shape[-1]), out.dtype)
    return empty.at[place].set(out.reshape(-1, out.shape[-1]), mode="drop", unique_indices=True)


def _torch(shape, sizes: tuple[int, ...], part: str) -> Contestants:
    import torch  # pyrefly: ignore

    torch.set_num_threads(1)
    x, weights, dy = (torch.from_numpy(a) for a in _draw(shape, len(sizes)))
    ends = torch.from_numpy(np.cumsum(sizes).astype(np.int32))

    def run(product: Callable[..., Any], w: Any) -> Callable[[], Any]:
        def backward() -> None:
            leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
            product(*leaves).backward(dy)

        return backward if part == "forward_backward" else lambda: product(x, w)

    grouped = lambda x, w: torch.nn.functional.grouped_mm(x, w, offs=ends)
    return {"torch": run(grouped, weights), "torch_dense": run(torch.matmul, weights[0])}


if __name__ == "__main__":
    for line in rows(quick=False):
        print(json.dumps(line), flush=True)
