"""Free experts: does the time follow the networks that are left out?

Realisation ratio = (seconds of top-2 over networks / seconds with free experts) / (FLOPs of the first / FLOPs that the
second needs), both layers of 8 networks with even loads, sizes as in `dyncomp.bench.layer`. The loads are planted at
the minimum of the heterogeneous balance loss: a row then uses 2 tau 8 / (8 tau + 4) networks (MoE++, arXiv 2410.07348).
"""

import functools
from typing import Any

import jax
import numpy as np

from dyncomp.bench import fresh, layer, timing
from dyncomp.core.ledger import Ledger
from dyncomp.experts import MoE
from dyncomp.routers import TopK

NETWORKS, KINDS = 8, ("constant", "constant", "copy", "zero")
TAUS = (0.75, 0.25)
GOAL = 0.85
REFERENCE = "(seconds top-2 / seconds with free experts) / (FLOPs top-2 / FLOPs needed): {part}, tau {tau} at balance"


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a tau and part; ``quick`` takes the first."""
    parts = ("forward",) if quick else ("forward", "gradient")
    return [_row(tau, part, quick) for tau in (TAUS[:1] if quick else TAUS) for part in parts]


def _row(tau: float, part: str, quick: bool) -> dict[str, Any]:
    found = fresh.call(
        f"{__name__}:measured", {"tau": tau, "part": part, "quick": quick}, pinned=True
    )
    pairs = timing.Pairs(**found["pairs"])
    share = found["needed"] / found["needed_peer"]
    ratio, interval = timing.median_interval([share / ratio for ratio in pairs.ratios("cpu")])
    ours, peer = pairs.seconds("cpu")
    return timing.row(
        f"experts/free/tau_{tau}/{part}",
        ratio,
        interval,
        reference=REFERENCE.format(part=part, tau=tau),
        runs=len(pairs.ours),
        goal=None if quick else GOAL,
        relation="report" if quick else ">=",
        peer="top-2 over networks",
        median_ours=ours,
        median_peer=peer,
        needed=found["needed"],
        executed=found["executed"],
        needed_peer=found["needed_peer"],
        networks=found["networks"],
    )


def measured(tau: float, part: str, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: with free experts), FLOPs of the forward pass, and networks a row."""
    n, d = (layer.QUICK_ROWS, layer.QUICK_WIDTH) if quick else (layer.ROWS, layer.WIDTH)
    sizes = {"num_experts": NETWORKS, "hidden": layer.HIDDEN * d // layer.WIDTH, "parent": None}
    released = functools.partial(TopK, k=layer.K, null_experts=1)
    ours = MoE(router=released, free=KINDS, free_weight=tau, **sizes)
    peer = MoE(router=functools.partial(TopK, k=layer.K), **sizes)
    x = layer.inputs(n, d)
    weights = np.array([tau] * NETWORKS + [1.0] * len(KINDS))
    sides = {
        "ours": (ours, layer.plant(ours, x, weights / weights.sum())),
        "peer": (peer, layer.plant(peer, x, np.full(NETWORKS, 1 / NETWORKS))),
    }
    ours_run, peer_run = (layer.runner(m, variables, x, part) for m, variables in sides.values())
    pairs = timing.interleaved(ours_run, peer_run, layer.QUICK_PAIRS if quick else layer.PAIRS)
    spent = {name: Ledger(module.cost(d)).record(jax.jit(module.apply)(variables, x)[1].events)
             for name, (module, variables) in sides.items()}  # fmt: skip
    return {
        "pairs": vars(pairs),
        "needed": spent["ours"].total("needed"),
        "executed": spent["ours"].total("executed"),
        "needed_peer": spent["peer"].total("needed"),
        "networks": spent["ours"].events(under="experts/rows") / n,
    }
