"""The mixture of experts against PyTorch on one thread, forward.

Against the index-add loop of `transformers` (its Mixtral block, eager): seconds against seconds, both libraries in one
process in turn. Against a layer on `torch.nn.functional.grouped_mm`: each side's ratio to its own dense unit of equal
active FLOPs, so that neither side's matrix product counts. Without PyTorch and transformers these rows are left out.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from dyncomp.bench import fresh, layer, loads, timing
from dyncomp.core.errors import DyncompError
from dyncomp.experts import MoE
from dyncomp.routers import TopK

EXPERTS, LOAD = 8, "dirichlet4"
LOOP_EXPERTS = (8, 64)
LOOP_GOAL, GROUPED_GOAL = 0.5, 1 / 0.9
LOOP = "seconds of the layer / of the same layer as transformers runs Mixtral (eager, PyTorch), {e} experts, {load}"
GROUPED = "(ours / our dense unit) / (sort and torch.nn.functional.grouped_mm / its dense unit)"


def rows(quick: bool) -> list[dict[str, Any]]:
    """Two rows against the loop, one against the grouped product; none without the peers, or in a smoke run."""
    if quick or not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        return []
    return [*map(_loop_row, LOOP_EXPERTS), _grouped_row()]


def _loop_row(experts: int) -> dict[str, Any]:
    found = fresh.call(f"{__name__}:against_loop", {"experts": experts}, pinned=True)
    return timing.row_of_pairs(
        f"experts/torch/loop/{experts}",
        timing.Pairs(**found),
        reference=LOOP.format(e=experts, load=LOAD),
        clock="cpu",
        goal=LOOP_GOAL,
        relation="<=",
        peer="transformers",
    )


def _grouped_row() -> dict[str, Any]:
    words = {"experts": EXPERTS, "load": LOAD, "part": "forward", "quick": False}
    ours = timing.Pairs(**fresh.call(f"{layer.__name__}:measured", words, pinned=True)["pairs"])
    theirs = timing.Pairs(**fresh.call(f"{__name__}:grouped_mm", {}, pinned=True))
    ratios = [a / b for a, b in zip(ours.ratios("cpu"), theirs.ratios("cpu"), strict=True)]
    ratio, interval = timing.median_interval(ratios)
    return timing.row(
        "experts/torch/grouped_mm",
        ratio,
        interval,
        reference=GROUPED,
        runs=len(ratios),
        goal=GROUPED_GOAL,
        relation="<=",
        peer="PyTorch",
        median_ours=timing.median_interval(ours.ratios("cpu"))[0],
        median_peer=timing.median_interval(theirs.ratios("cpu"))[0],
    )


def against_loop(experts: int) -> dict[str, Any]:
    """Pairs of seconds: our layer, and transformers' block with the same weights on the same rows.

    Raises:
      DyncompError: the two do not compute the same.
    """
    import torch  # pyrefly: ignore

    torch.set_num_threads(1)
    router = functools.partial(TopK, k=layer.K)
    ours = MoE(router=router, num_experts=experts, hidden=layer.HIDDEN, parent=None)
    x = layer.inputs(layer.ROWS, layer.WIDTH)
    variables = layer.plant(ours, x, loads.shares(LOAD, experts))
    run = layer.runner(layer.outputs(ours), variables, x, "forward")
    theirs, rows = _block(torch, variables["params"]), torch.from_numpy(np.array(x))

    def loop() -> Any:
        with torch.no_grad():
            return theirs(rows)

    apart = float(np.abs(np.asarray(run()) - loop().numpy()).max())
    if apart > 1e-3:
        raise DyncompError(f"the layer and transformers' differ by {apart}: nothing to compare")
    return vars(timing.interleaved(run, loop, layer.PAIRS))


def _block(torch: Any, params: Any) -> Any:
    """transformers' Mixtral block, eager, with our weights."""
    from transformers import MixtralConfig  # pyrefly: ignore
    from transformers.models.mixtral.modeling_mixtral import (  # pyrefly: ignore
        MixtralSparseMoeBlock,
    )

    gate, up, down = (
        np.asarray(params[n]).transpose(0, 2, 1).copy() for n in ("gate", "up", "down")
    )
    e, f, d = gate.shape
    config = MixtralConfig(hidden_size=d, intermediate_size=f, num_local_experts=e)
    config.num_experts_per_tok, config._experts_implementation = layer.K, "eager"
    block = MixtralSparseMoeBlock(config)
    names = {
        "gate.weight": np.asarray(params["router"]["kernel"]).T.copy(),
        "experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        "experts.down_proj": down,
    }
    block.load_state_dict({n: torch.from_numpy(w) for n, w in names.items()})
    return block


def grouped_mm() -> dict[str, Any]:
    """Pairs of seconds: PyTorch's layer on its grouped product, and its dense unit, on the same rows and load."""
    import torch  # pyrefly: ignore

    torch.set_num_threads(1)
    experts, dense, logits, x = _problem(torch)
    with torch.no_grad():
        pairs = timing.interleaved(
            lambda: _grouped(torch, experts, logits, x),
            lambda: _swiglu(torch, dense, x),
            layer.PAIRS,
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
