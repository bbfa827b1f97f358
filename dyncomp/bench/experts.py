"""`dyncomp bench experts`: the mixture of experts against the dense unit of equal active width.

Realisation ratio = (seconds of the dense unit / seconds of the mixture) / (FLOPs the dense unit needs / FLOPs the
mixture needs): 1 where time follows the FLOPs that the plan requires, less where routing, sorting and padding cost
time of their own. Top-p's p is set so that a row takes two experts in the mean, like top-2; a dense unit of two
experts' width is then the reference of both. Fresh routers are nearly uniform, which gives every row equally many
experts; their scores are scaled up, so that rows differ as they do after training. FLOPs are those of what ran while
the time was taken.

By processor time on one pinned thread; a run on all cores stands beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.bench import fresh, layer, peers, savings, timing
from dyncomp.bench.overhead import QUICK, Scale, make_run
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Factory
from dyncomp.experts import MoE, SwiGLU
from dyncomp.routers import TopK, TopP
from dyncomp.tasks.loader import Loader
from dyncomp.training.engine import Engine

ROUTERS = ("top_2", "top_p")
PARTS = ("forward", "gradient", "train_step")
PAIRS, QUICK_PAIRS = 40, 6
MAX_P = 0.6
SHARPEN = 4.0
"""Factor on the router's weights: scores of unit rows then have a standard deviation of about 1."""

REFERENCE = "(seconds dense / seconds experts) / (FLOPs dense / FLOPs needed): {part}, dense unit of equal active width"


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a router and part, then those of `layer`, `savings` and `peers`; ``quick`` takes few of each."""
    parts = PARTS[:1] if quick else PARTS
    found = [_row(router, part, quick) for router in ROUTERS for part in parts]
    return [*found, *layer.rows(quick), *savings.rows(quick), *peers.rows(quick)]


def _row(router: str, part: str, quick: bool) -> dict[str, Any]:
    words = {"router": router, "part": part, "quick": quick}
    target = f"{__name__}:measured"
    found = fresh.call(target, words, pinned=True)
    wide = None if quick else fresh.call(target, words)
    pairs = timing.Pairs(**found["pairs"])
    ratio, interval = _realised(pairs, "cpu", found)
    ours, peer = pairs.seconds("cpu")
    return timing.row(
        f"experts/{router}/{part}",
        ratio,
        interval,
        reference=REFERENCE.format(part=part.replace("_", " ")),
        peer="SwiGLU",
        runs=len(pairs.ours),
        median_ours=ours,
        median_peer=peer,
        needed=found["needed"],
        executed=found["executed"],
        needed_peer=found["needed_peer"],
        active_experts=found["active"],
        wall=wide and _realised(timing.Pairs(**wide["pairs"]), "wall", wide),
    )


def _realised(pairs: timing.Pairs, clock: timing.Clock, found: dict[str, Any]) -> Any:
    """Realisation ratio and its interval."""
    share = found["needed"] / found["needed_peer"]
    return timing.median_interval([share / ratio for ratio in pairs.ratios(clock)])


@dataclasses.dataclass
class Side:
    """One of the two things that are timed.

    Attributes:
      run: does the work once, waits for it and returns the event counts.
      costs: prices of the events.
      rows: rows times layers of one run.
      events: what the runs returned.
    """

    run: Callable[[], Any]
    costs: Mapping[str, Any]
    rows: int
    events: list[Any] = dataclasses.field(default_factory=list)

    def __call__(self) -> None:
        """One run."""
        self.events.append(self.run())

    def spent(self) -> dict[str, float]:
        """Mean FLOPs of a run, needed and executed, and the experts that a row of a layer took."""
        ledger, runs = Ledger(self.costs), len(self.events)
        for events in self.events:
            ledger.record(events)
        found: dict[str, float] = {w: ledger.total(w) / runs for w in ("needed", "executed")}
        return {**found, "active": ledger.events(under="experts/rows") / runs / self.rows}


def measured(router: str, part: str, quick: bool) -> dict[str, Any]:
    """Pairs of seconds (ours: experts, peer: dense) and FLOPs of the forward pass (a backward pass needs twice that).

    Args:
      router: of `ROUTERS`.
      part: of `PARTS`; the train step is that of a whole language model, the others are of the layer alone.
      quick: tiny shapes, few pairs.
    """
    scale, pairs = (QUICK, QUICK_PAIRS) if quick else (Scale(), PAIRS)
    experts, dense = mixture(router, scale), functools.partial(SwiGLU, hidden=scale.hidden)
    make = _train_step if part == "train_step" else functools.partial(_layer, part=part)
    ours, peer = make(scale, experts), make(scale, dense)
    found = timing.interleaved(ours, peer, pairs)
    return {"pairs": vars(found), **ours.spent(), "needed_peer": peer.spent()["needed"]}


def mixture(router: str, scale: Scale) -> Factory:
    """Experts of half the dense unit's width."""
    routers: dict[str, Any] = {"top_2": functools.partial(TopK, k=2)}
    routers["top_p"] = functools.partial(TopP, max_p=MAX_P)
    sizes = {"num_experts": scale.experts, "hidden": scale.hidden // 2}
    return functools.partial(MoE, router=routers[router], **sizes)


def two_experts(active: Callable[[float], float]) -> float:
    """The p in [0, `MAX_P`] at which ``active(p)``, which rises with p, reaches 2; by bisection."""
    low, high = 0.0, MAX_P
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if active(middle) < 2 else (low, middle)
    return high


def sharpened(params: Any) -> Any:
    """The parameters with every router's weights times `SHARPEN`."""
    scale = lambda path, leaf: leaf * SHARPEN if "router" in jax.tree_util.keystr(path) else leaf
    return jax.tree_util.tree_map_with_path(scale, params)


def _balanced(side: Side, variables: Any, forward: Callable[[Any], Any]) -> Any:
    """The variables with every control p such that a row takes two experts; unchanged without such a control."""
    controls = variables.get("controls", {})
    if not jax.tree.leaves(controls):
        return variables
    at = lambda p: {**variables, "controls": jax.tree.map(lambda c: jnp.full_like(c, p), controls)}
    active = lambda p: dataclasses.replace(side, events=[forward(at(p))]).spent()["active"]
    return at(two_experts(active))


def _layer(scale: Scale, ffn: Factory, part: str) -> Side:
    """The layer alone on normal rows, forward or the gradients of parameters and rows."""
    layer = ffn(parent=None)
    x = jax.random.normal(jax.random.key(1), (scale.batch, scale.context, scale.d_model))
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x))
    apply = jax.jit(lambda variables, x: layer.apply(variables, x))

    def loss(params: Any, controls: Any, x: Any) -> Any:
        y, aux = layer.apply({"params": params, "controls": controls}, x)
        return jnp.sum(y**2), aux.events

    gradient = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True))
    side = Side(lambda: None, layer.cost(scale.d_model), scale.batch * scale.context)
    variables = {**variables, "params": sharpened(variables["params"])}
    variables = _balanced(side, variables, lambda v: apply(v, x)[1].events)
    own = (variables["params"], variables.get("controls", {}), x)
    forward = lambda: jax.block_until_ready(apply(variables, x))[1].events
    backward = lambda: jax.block_until_ready(gradient(*own))[1]
    return dataclasses.replace(side, run=forward if part == "forward" else backward)


def _train_step(scale: Scale, ffn: Factory) -> Side:
    """A train step of the language model on one batch."""
    run = make_run(scale, ffn, 10_000, "unroll")
    engine = Engine(run)
    batch = Loader(run.task.source("train"), seed=0, batch_size=run.batch_size).batch(0)
    compiled, _ = engine.compile(0, batch)
    costs: Any = run.model.cost(batch["inputs"].shape)  # pyrefly: ignore
    side = Side(lambda: None, costs, batch["inputs"].size * scale.depth)
    first = engine.fresh()
    first = first.replace(params=sharpened(first.params))
    forward = lambda v: engine.forward(v, batch)[1].events
    state = [first.replace(controls=_balanced(side, first.variables, forward)["controls"])]

    def step() -> Any:
        state[0], out = jax.block_until_ready(compiled(state[0], batch, np.int32(0)))
        return out["events"]

    return dataclasses.replace(side, run=step)
