"""Whole layers of experts under planted loads: against one dense unit of equal active FLOPs, and against PyTorch.

4,096 rows of width 512, experts of width 1,024, two a row, float32; by processor time of one pinned thread. The first
input of every row is 1, so that a row of the router's weights acts as a bias, which plants the load. On one
load the forms of `dyncomp.bench.rivals` stand beside this library's.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.bench import fresh, loads, rivals, timing
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
RIVAL_EXPERTS = (8, 64)
PAIRS, QUICK_PAIRS = 30, 3
SLOW_PAIRS = 8
REFERENCE = "seconds of the whole layer (route, dispatch, experts, combine) / of one dense unit of equal active FLOPs"


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a number of experts, load and part."""
    if quick:
        return [_row(EXPERTS[0], "dirichlet4", "forward", quick)]
    cases = itertools.product(EXPERTS, loads.LOADS, GOALS)
    observed = len(loads.TRAINED)
    own = [
        _row(e, load, part, quick) for e, load, part in cases if load != "trained" or e == observed
    ]
    others = itertools.product(rivals.FORMS, RIVAL_EXPERTS, GOALS)
    return own + [_row(e, "dirichlet4", part, quick, form) for form, e, part in others]


def _row(experts: int, load: str, part: str, quick: bool, form: str = "dropless") -> dict[str, Any]:
    words = {"experts": experts, "load": load, "part": part, "quick": quick, "form": form}
    found = fresh.call(f"{__name__}:measured", words, pinned=True)
    ours = form == "dropless"
    goal = GOALS[part][experts] if load == "dirichlet4" and ours and not quick else None
    return timing.row_of_pairs(
        f"experts/{'layer' if ours else form}/{load}/{experts}/{part}",
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


def measured(
    experts: int, load: str, part: str, quick: bool, form: str = "dropless"
) -> dict[str, Any]:
    """Pairs of seconds (ours: the layer, peer: dense), FLOPs of the forward pass, largest load / even load.

    ``form`` is "dropless" or of `rivals.FORMS`.
    """
    n, d = (QUICK_ROWS, QUICK_WIDTH) if quick else (ROWS, WIDTH)
    hidden = HIDDEN * d // WIDTH
    sizes = {"num_experts": experts, "hidden": hidden, "parent": None}
    layer = MoE(router=functools.partial(TopK, k=K), **sizes, **rivals.options(form))
    x = inputs(n, d)
    variables = plant(layer, x, loads.shares(load, experts))
    dense = SwiGLU(hidden=K * hidden, parent=None)
    own = nn.meta.unbox(jax.jit(dense.init)(jax.random.key(0), x))
    apply = functools.partial(rivals.one_hot, K) if form == "one_hot" else outputs(layer)
    full = SLOW_PAIRS if form in rivals.SLOW else PAIRS
    pairs = timing.interleaved(
        runner(apply, variables, x, part),
        runner(outputs(dense), own, x, part),
        QUICK_PAIRS if quick else full,
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


def outputs(module: nn.Module) -> Callable[[Any, Any], Any]:
    """The module as a function of variables and rows that gives its outputs alone."""
    return lambda variables, x: module.apply(variables, x)[0]  # type: ignore[index]


def inputs(n: int, d: int) -> Any:
    """Normal rows [1 n d] whose first entry is 1."""
    return jax.random.normal(jax.random.key(1), (1, n, d)).at[..., 0].set(1.0)


def plant(layer: Any, x: Any, target: np.ndarray, k: int = K) -> dict[str, Any]:
    """Variables of ``layer`` whose top-k router spreads the rows as ``target`` says (`loads.planted_biases`)."""
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))
    kernel = np.array(variables["params"]["router"]["kernel"]) * 2
    kernel[0] = 0
    logits = np.asarray(x[0]) @ kernel
    kernel[0] = loads.planted_biases(logits, k, target)
    router = {**variables["params"]["router"], "kernel": jnp.asarray(kernel)}
    return {**variables, "params": {**variables["params"], "router": router}}


def runner(
    apply: Callable[[Any, Any], Any], variables: Any, x: Any, part: str
) -> Callable[[], Any]:
    """A call that runs ``apply(variables, x)``, or the gradients of parameters and rows, and waits."""
    rest = {name: value for name, value in variables.items() if name != "params"}
    run = lambda params, x: apply({**rest, "params": params}, x)
    loss = lambda params, x: jnp.sum(run(params, x) ** 2)
    fn = jax.jit(run if part == "forward" else jax.grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(fn(variables["params"], x))
