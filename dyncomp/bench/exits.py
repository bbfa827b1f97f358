"""`dyncomp bench exits`: the host executor against the full network without exits.

Realisation ratio = (seconds full / seconds with exits) / (FLOPs full / FLOPs needed): 1 where time follows the FLOPs
that the plan requires, less where launches, padding and exit heads cost time of their own. The full network runs as
one compiled program, scanned or unrolled, whichever is faster here.

The exit distribution is planted, because time depends on who leaves where and not on the values: weights and images
are random, and thresholds are solved on other random images so that half of what is left leaves at every exit (the
rest stays to the end). The share that really left where is in the row (``histogram``).

By wall time on all cores, pairs interleaved; every pair runs the same images on both sides.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from flax import linen as nn

from dyncomp.attention import Attention
from dyncomp.bench import exit_runtime, timing
from dyncomp.exits import ConfidenceRule, ExitBank, GateRule
from dyncomp.exits.calibration import chain_thresholds
from dyncomp.experts import MLP
from dyncomp.models import Block, ExitingClassifier, Group, VisionTransformer, layout
from dyncomp.models.group import Execution
from dyncomp.runtime import HostExecutor, MaskedExecutor, Segmented, from_model

BATCHES, QUICK_BATCHES = (1, 8, 64, 256), (4,)
PAIRS, QUICK_PAIRS = 40, 6
IMAGES = 64
"""Fewest images a side runs in a pair, so that small batches see the whole distribution."""
CALIBRATION = 1000
SIDE = 28

REFERENCE = (
    "(seconds full / seconds with exits) / (FLOPs full / FLOPs needed): batch {batch}, the full network as one program"
    " ({form}), planted exits (half of what is left leaves at each)"
)


@dataclasses.dataclass(frozen=True)
class Size:
    """A vision transformer for 28 x 28 grey images, with an exit after every block but the last."""

    d_model: int
    depth: int
    heads: int
    hidden: int
    patch: int

    def backbone(self, layers: Execution) -> Callable[..., VisionTransformer]:
        """Factory of the network."""
        attention = functools.partial(
            Attention, heads=self.heads, rope_theta=None, causal=False, bias=True
        )
        ffn = functools.partial(MLP, hidden=self.hidden)
        block = functools.partial(Block, mixer=attention, ffn=ffn, norm="layer")
        return functools.partial(
            VisionTransformer, classes=10, patch=self.patch, d_model=self.d_model,
            groups=(Group((block,), self.depth),), layers=layers,
        )  # fmt: skip


SIZES = {
    "laptop": Size(64, 6, 4, 128, 7),  # configs/jei_dnn.gin
    "wide": Size(256, 7, 4, 512, 4),  # the widths of configs/jei_dnn_paper.gin on 50 tokens
}
RULES = {
    "gates": (GateRule(), ExitBank),
    "confidence": (ConfidenceRule(), functools.partial(ExitBank, gated=False)),
}


def rows(quick: bool) -> list[dict[str, Any]]:
    """One row a size, rule and batch, then those of `exit_runtime`; ``quick`` takes one of each."""
    one = slice(1 if quick else None)
    sizes, rules = list(SIZES)[one], list(RULES)[one]
    batches = QUICK_BATCHES if quick else BATCHES
    found = []
    for name, rule, batch in itertools.product(sizes, rules, batches):
        print(f"exits/{name}/{rule}/batch_{batch} ...", file=sys.stderr, flush=True)
        found.append(_row(name, rule, batch, QUICK_PAIRS if quick else PAIRS))
    return found + exit_runtime.rows(quick)


def halving(exits: int) -> np.ndarray:
    """Shares [x] of ``exits`` ways to leave: 1/2, 1/4, ..., and the rest at the end."""
    shares = 0.5 ** np.arange(1, exits + 1)
    shares[-1] = 1.0 - shares[:-1].sum()
    return shares


@functools.cache
def planted(size: Size, rule: str, seed: int = 0) -> tuple[Segmented, Any]:
    """Segments of a network with random weights, and its backbone's variables; thresholds give `halving` shares."""
    policy, bank = RULES[rule]
    model = ExitingClassifier(backbone=size.backbone("unroll"), exits=bank, rule=policy)
    images = _images(CALIBRATION, seed + 1)
    stored = ExitingClassifier(backbone=size.backbone("scan"), exits=bank, rule=policy)
    variables = nn.meta.unbox(jax.jit(stored.init)(jax.random.key(seed), images[:1]))
    if (
        "gates" in variables["params"]["bank"]
    ):  # small, so that mass is left to decide at every exit
        bias = variables["params"]["bank"]["gates"]["bias"]
        variables["params"]["bank"]["gates"]["bias"] = bias - 4.0
    net = from_model(model, variables, images.shape)
    scores = np.asarray(MaskedExecutor(net)(images).plan.scores)[:, : size.depth - 1]
    thresholds = chain_thresholds(scores.T.astype(np.float64), halving(size.depth))
    net = dataclasses.replace(net, thresholds=thresholds.astype(np.float32).tolist())
    return net, {"params": variables["params"]["net"]}


def _images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, SIDE, SIDE, 1)).astype(np.float32)


def full_network(size: Size, variables: Any, batch: np.ndarray) -> tuple[str, Callable[[Any], Any]]:
    """(form, call) of the faster form of the network without exits on batches like ``batch``."""
    found = []
    for form in get_args(Execution):
        model = size.backbone(form)()
        own = variables if form == "scan" else layout.unstack(variables)
        run = jax.jit(lambda own, images, model=model: model.apply(own, images)[0])
        compiled = run.lower(own, batch).compile()
        call = lambda images, compiled=compiled, own=own: np.asarray(compiled(own, images))
        found.append((_fastest(lambda call=call: call(batch)), form, call))
    _, form, call = min(found, key=lambda one: one[0])
    return form, call


def _fastest(call: Callable[[], Any], times: int = 10) -> float:
    taken = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _row(name: str, rule: str, batch: int, pairs: int) -> dict[str, Any]:
    size = SIZES[name]
    net, variables = planted(size, rule)
    images = _images(max(batch, IMAGES), 2)
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    form, full = full_network(size, variables, parts[0])
    host = HostExecutor(net, parts[0], capacity=batch).warm_up().tune()
    results = [host(part) for part in parts]
    needed, executed = (sum(r.ledger.total(w) for r in results) for w in ("needed", "executed"))
    dense = len(images) * full_flops(size, images.shape)
    found = timing.interleaved(
        lambda: [host(part) for part in parts], lambda: [full(part) for part in parts], pairs
    )
    ratio, interval = timing.median_interval([needed / dense / r for r in found.ratios()])
    ours, peer = found.seconds()
    exits = np.concatenate([np.asarray(result.plan.exit) for result in results])
    return timing.row(
        f"exits/{name}/{rule}/batch_{batch}",
        ratio,
        interval,
        reference=REFERENCE.format(batch=batch, form=form),
        peer=f"VisionTransformer, {form}",
        runs=pairs,
        median_ours=ours,
        median_peer=peer,
        needed=needed,
        executed=executed,
        needed_peer=dense,
        speedup=peer / ours,
        clock="wall",
        images=len(images),
        histogram=np.bincount(exits, minlength=size.depth).tolist(),
    )


def full_flops(size: Size, shape: tuple[int, ...]) -> int:
    """FLOPs of one image through the network without exits."""
    whole = ExitingClassifier(backbone=size.backbone("scan"), exits=ExitBank)
    exits = sum(cost.flops for cost in ExitBank(exits=1, classes=10).cost(size.d_model).values())
    return sum(price.flops for price in whole.cost(shape).values()) - (size.depth - 1) * exits
