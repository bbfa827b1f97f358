"""Whole layers of experts under planted loads: against one dense unit of equal active FLOPs, and against PyTorch.

4,096 rows of width 512, experts of width 1,024, two a row, float32; by processor time of one pinned thread. The first
input of every row is 1, so that a row of the router's weights acts as a bias, which plants the load.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.bench import fresh, loads, timing
from dyncomp.core.ledger import Ledger
from dyncomp.experts import MoE, SwiGLU
from dyncomp.routers import TopK

ROWS, WIDTH, HIDDEN, K = 4096, 512, 1024, 2
QUICK_ROWS, QUICK_WIDTH = 128, 32
EXPERTS = (8, 32, 64)
GOALS = {
    "forward": {8: 1.15, 32: 1.3, 64: 1.5},
    "gradient": {8: 1.25, 32: 1.45, 64: 1.7},
}
"""On the load "dirichlet4"."""
PAIRS, QUICK_PAIRS = 30, 3
REFERENCE = "seconds of the whole layer (route, dispatch, experts, combine) / of one dense unit of equal active FLOPs"


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a number of experts, load and part."""
    if quick:
        return [_row(EXPERTS[0], "dirichlet4", "forward", quick)]
    cases = itertools.product(EXPERTS, loads.LOADS, GOALS)
    observed = len(loads.TRAINED)
    return [
        _row(e, load, part, quick) for e, load, part in cases if load != "trained" or e == observed
    ]


def _row(experts: int, load: str, part: str, quick: bool) -> dict[str, Any]:
    words = {"experts": experts, "load": load, "part": part, "quick": quick}
    found = fresh.call(f"{__name__}:measured", words, pinned=True)
    goal = GOALS[part][experts] if load == "dirichlet4" and not quick else None
    return timing.row_of_pairs(
        f"experts/layer/{load}/{experts}/{part}",
        timing.Pairs(**found["pairs"]),
        reference=REFERENCE,
        clock="cpu",
        goal=goal,
        relation="report" if goal is None else "<=",
        peer="SwiGLU",
        needed=found["needed"],
        executed=found["executed"],
        needed_peer=found["needed_peer"],
        largest_load=found["largest_load"],
    )


def measured(experts: int, load: str, part: str, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: the layer, peer: dense), FLOPs of the forward pass, largest load / even load."""
    n, d = (QUICK_ROWS, QUICK_WIDTH) if quick else (ROWS, WIDTH)
    hidden = HIDDEN * d // WIDTH
    layer = MoE(
        router=functools.partial(TopK, k=K), num_experts=experts, hidden=hidden, parent=None
    )
    x = inputs(n, d)
    variables = plant(layer, x, loads.shares(load, experts))
    dense = SwiGLU(hidden=K * hidden, parent=None)
    own = nn.meta.unbox(jax.jit(dense.init)(jax.random.key(0), x))
    pairs = timing.interleaved(
        runner(layer, variables, x, part),
        runner(dense, own, x, part),
        QUICK_PAIRS if quick else PAIRS,
    )
    _, aux = jax.jit(functools.partial(layer.apply, capture=("plan",)))(variables, x)
    ledger = Ledger(layer.cost(d)).record(aux.events)
    return {
        "pairs": vars(pairs),
        "needed": ledger.total("needed"),
        "executed": ledger.total("executed"),
        "needed_peer": n * dense.cost(d)["tokens"].flops,
        "largest_load": float(np.max(aux.plans["load"]) * experts / (K * n)),
    }


def inputs(n: int, d: int) -> Any:
    """Normal rows [1 n d] whose first entry is 1."""
    return jax.random.normal(jax.random.key(1), (1, n, d)).at[..., 0].set(1.0)


def plant(layer: MoE, x: Any, target: np.ndarray) -> dict[str, Any]:
    """Variables of ``layer`` whose router spreads the rows as ``target`` says (`loads.planted_biases`)."""
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))
    kernel = np.array(variables["params"]["router"]["kernel"]) * 2
    kernel[0] = 0
    logits = np.asarray(x[0]) @ kernel
    kernel[0] = loads.planted_biases(logits, K, target)
    router = {**variables["params"]["router"], "kernel": jnp.asarray(kernel)}
    return {**variables, "params": {**variables["params"], "router": router}}


def runner(module: nn.Module, variables: Any, x: Any, part: str) -> Callable[[], Any]:
    """A call that runs the forward pass, or the gradients of parameters and rows, and waits."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(module.apply({**rest, "params": params}, x)[0] ** 2)  # type: ignore[index]

    forward = jax.jit(lambda params, x: module.apply({**rest, "params": params}, x)[0])  # type: ignore[index]
    fn = forward if part == "forward" else jax.jit(jax.grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(fn(variables["params"], x))
