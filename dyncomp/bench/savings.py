"""Units that leave work out: does the time follow?

Realisation ratio = (seconds of the reference / seconds of the unit) / (FLOPs of the reference / FLOPs that the unit
needs), float32, sizes as in `dyncomp.bench.layer`:

* ``free``: 8 networks and 4 experts without one, against top-2 over the 8. Loads are planted at the minimum of the
  heterogeneous balance loss: a row then uses 2 tau 8 / (8 tau + 4) networks (MoE++, arXiv 2410.07348).
* ``ladder``: two rows of five run all of a network's width, two an eighth, one nothing, against the network on all rows
  (Duo-LLM, arXiv 2410.10846).
* ``slices``: each row runs half of a network's four slices, against the whole network (FactorLLM, arXiv 2408.11855).
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dyncomp.bench import fresh, layer, timing
from dyncomp.core.ledger import Ledger
from dyncomp.experts import Ladder, MoE, SlicedFFN, SwiGLU
from dyncomp.routers import TopK

CASES = ("free/tau_0.75", "free/tau_0.25", "ladder", "slices")
GOAL = 0.85
"""Of the free experts."""
NETWORKS, KINDS = 8, ("constant", "constant", "copy", "zero")
SHARES = (0.4, 0.4, 0.2)
SLICES = 4
REFERENCE = "(seconds reference / seconds unit) / (FLOPs reference / FLOPs needed): {case}, {part}"


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a case and part; ``quick`` takes the forward pass of one of each kind."""
    if quick:
        return [_row(case, "forward", quick) for case in CASES[1:]]
    return [_row(case, part, quick) for case in CASES for part in ("forward", "gradient")]


def _row(case: str, part: str, quick: bool) -> dict[str, Any]:
    words = {"case": case, "part": part, "quick": quick}
    found = fresh.call(f"{__name__}:measured", words, pinned=True)
    pairs = timing.Pairs(**found["pairs"])
    share = found["needed"] / found["needed_peer"]
    ratio, interval = timing.median_interval([share / ratio for ratio in pairs.ratios("cpu")])
    ours, peer = pairs.seconds("cpu")
    goal = GOAL if case.startswith("free") and not quick else None
    return timing.row(
        f"experts/{case}/{part}",
        ratio,
        interval,
        reference=REFERENCE.format(case=case, part=part),
        runs=len(pairs.ours),
        goal=goal,
        relation="report" if goal is None else ">=",
        peer=found["peer"],
        median_ours=ours,
        median_peer=peer,
        needed=found["needed"],
        executed=found["executed"],
        needed_peer=found["needed_peer"],
    )


@dataclasses.dataclass
class Side:
    """A unit and its variables."""

    unit: Any
    variables: Any

    def flops(self, x: Any) -> dict[str, float]:
        """FLOPs of the forward pass on ``x``, needed and executed."""
        ledger = Ledger(self.unit.cost(x.shape[-1]))
        ledger.record(jax.jit(self.unit.apply)(self.variables, x)[1].events)
        return {name: ledger.total(name) for name in ("needed", "executed")}


def measured(case: str, part: str, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: the unit, peer: its reference) and FLOPs of the forward pass."""
    n, d = (layer.QUICK_ROWS, layer.QUICK_WIDTH) if quick else (layer.ROWS, layer.WIDTH)
    x, hidden = layer.inputs(n, d), layer.HIDDEN * d // layer.WIDTH
    kind, _, tau = case.partition("/tau_")
    sides = _free(float(tau), x, hidden) if tau else _thin(kind, x, layer.K * hidden)
    run = lambda side: layer.runner(layer.outputs(side.unit), side.variables, x, part)
    pairs = timing.interleaved(
        run(sides[0]), run(sides[1]), layer.QUICK_PAIRS if quick else layer.PAIRS
    )
    ours, peer = (side.flops(x) for side in sides)
    name = type(sides[1].unit).__name__
    return {"pairs": vars(pairs), **ours, "needed_peer": peer["needed"], "peer": name}


def _free(tau: float, x: Any, hidden: int) -> tuple[Side, Side]:
    sizes = {"num_experts": NETWORKS, "hidden": hidden, "parent": None}
    released = functools.partial(TopK, k=layer.K, null_experts=1)
    ours = MoE(router=released, free=KINDS, free_weight=tau, **sizes)
    peer = MoE(router=functools.partial(TopK, k=layer.K), **sizes)
    weights = np.array([tau] * NETWORKS + [1.0] * len(KINDS))
    even = np.full(NETWORKS, 1 / NETWORKS)
    planted = layer.plant(ours, x, weights / weights.sum()), layer.plant(peer, x, even)
    return Side(ours, planted[0]), Side(peer, planted[1])


def _thin(kind: str, x: Any, width: int) -> tuple[Side, Side]:
    """Less than a network of ``width``, and the network."""
    if kind == "ladder":
        one = functools.partial(TopK, k=1)
        unit: Any = Ladder(router=one, widths=(width, width // 8, 0), parent=None)
        variables = layer.plant(unit, x, np.array(SHARES), k=1)
    else:
        half = functools.partial(TopK, k=SLICES // 2)
        unit = SlicedFFN(router=half, num_slices=SLICES, hidden=width, parent=None)
        variables = layer.plant(unit, x, np.full(SLICES, 1 / SLICES), k=SLICES // 2)
    dense = SwiGLU(hidden=width, parent=None)
    own = nn.meta.unbox(jax.jit(dense.init)(jax.random.key(0), x))
    return Side(unit, variables), Side(dense, own)
