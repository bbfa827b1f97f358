"""The mixture of experts against PyTorch on one thread: its index-add loop, and its grouped product.

Compared are ratios to each side's own dense unit of equal active FLOPs, so that neither side's matrix product counts.
PyTorch is a peer to measure against: without it these rows are left out.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from dyncomp.bench import fresh, layer, loads, timing

EXPERTS, LOAD = 8, "dirichlet4"
GOALS = {"loop": 0.5, "grouped_mm": 1 / 0.9}
REFERENCE = {
    "loop": "(ours / our dense unit) / (an index-add loop over experts in PyTorch / its dense unit), forward",
    "grouped_mm": "(ours / our dense unit) / (sort and torch.nn.functional.grouped_mm / its dense unit), forward",
}


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a rival; none without PyTorch, or in a smoke run."""
    if quick or importlib.util.find_spec("torch") is None:
        return []
    return [_row(rival) for rival in GOALS]


def _row(rival: str) -> dict[str, Any]:
    words = {"experts": EXPERTS, "load": LOAD, "part": "forward", "quick": False}
    ours = timing.Pairs(**fresh.call(f"{layer.__name__}:measured", words, pinned=True)["pairs"])
    theirs = timing.Pairs(**fresh.call(f"{__name__}:measured", {"rival": rival}, pinned=True))
    ratios = [a / b for a, b in zip(ours.ratios("cpu"), theirs.ratios("cpu"), strict=True)]
    ratio, interval = timing.median_interval(ratios)
    return timing.row(
        f"experts/torch/{rival}",
        ratio,
        interval,
        reference=REFERENCE[rival],
        runs=len(ratios),
        goal=GOALS[rival],
        relation="<=",
        peer="PyTorch",
        median_ours=timing.median_interval(ours.ratios("cpu"))[0],
        median_peer=timing.median_interval(theirs.ratios("cpu"))[0],
    )


def measured(rival: str) -> dict[str, Any]:
    """Pairs of seconds (ours: PyTorch's layer, peer: its dense unit) on the same rows, weights and load."""
    import torch  # pyrefly: ignore

    torch.set_num_threads(1)
    experts, dense, logits, x = _problem(torch)
    with torch.no_grad():
        run = {"loop": _loop, "grouped_mm": _grouped}[rival]
        pairs = timing.interleaved(
            lambda: run(torch, experts, logits, x), lambda: _swiglu(torch, dense, x), layer.PAIRS
        )
    return vars(pairs)


def _problem(torch: Any) -> tuple[Any, Any, Any, Any]:
    rng, n, d, f = np.random.default_rng(0), layer.ROWS, layer.WIDTH, layer.HIDDEN
    draw = lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32) / 16)
    experts = draw(EXPERTS, d, f), draw(EXPERTS, d, f), draw(EXPERTS, f, d)
    dense = draw(d, layer.K * f), draw(d, layer.K * f), draw(layer.K * f, d)
    logits = rng.normal(size=(n, EXPERTS))
    logits += loads.planted_biases(logits, layer.K, loads.shares(LOAD, EXPERTS))
    return experts, dense, torch.from_numpy(logits.astype(np.float32)), draw(n, d) * 16


def _swiglu(torch: Any, weights: Any, x: Any, product: Callable[..., Any] | None = None) -> Any:
    multiply = product or torch.matmul
    gate, up, down = weights
    hidden = torch.nn.functional.silu(multiply(x, gate)) * multiply(x, up)
    return multiply(hidden, down)


def _gates(torch: Any, logits: Any) -> tuple[Any, Any]:
    weights, chosen = torch.topk(torch.softmax(logits, -1), layer.K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), chosen


def _loop(torch: Any, experts: Any, logits: Any, x: Any) -> Any:
    """Expert by expert: gather its rows, run it, add its outputs to their rows."""
    weights, chosen = _gates(torch, logits)
    out = torch.zeros_like(x)
    for index in range(EXPERTS):
        row, slot = torch.where(chosen == index)
        y = _swiglu(torch, tuple(w[index] for w in experts), x[row])
        out.index_add_(0, row, y * weights[row, slot, None])
    return out


def _grouped(torch: Any, experts: Any, logits: Any, x: Any) -> Any:
    """Sorted rows, three grouped products, rows back in place."""
    weights, chosen = _gates(torch, logits)
    order = torch.argsort(chosen.reshape(-1), stable=True)
    ends = torch.cumsum(torch.bincount(chosen.reshape(-1), minlength=EXPERTS), 0).to(torch.int32)
    product = lambda a, w: torch.nn.functional.grouped_mm(a, w, offs=ends)  # noqa: E731
    y = _swiglu(torch, experts, x[order // layer.K], product)
    back = torch.empty_like(y)
    back[order] = y
    return (back.reshape(len(x), layer.K, -1) * weights[..., None]).sum(1)
