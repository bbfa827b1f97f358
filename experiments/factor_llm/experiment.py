"""A dense byte-level language model cut into experts (FactorLLM, arXiv 2408.11855), before and after fine-tuning.

One dense network a seed. Before fine-tuning its slices are evaluated as they are, under routers fitted layer by layer
on the dense network's states and under controls and bounds; then slices and routers train on for 5% of the steps.
Quality is cross-entropy on the validation split; nothing was tuned on it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from dyncomp import config
from dyncomp.evidence.seed import load_module
from dyncomp.experts import SliceDense
from dyncomp.models import Group, apply
from dyncomp.routers import DistilledRouter, Hindsight, Random
from dyncomp.tasks import LMObjective
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.token_classes import CLASSES, byte_classes
from dyncomp.training import AdamW, InitFrom, Run
from dyncomp.training.evaluate import Evaluator, set_controls
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.state import init_variables, paths

SLUG = "factor_llm"
TITLE = "FactorLLM: a dense network cut into experts"
COMPUTE = "ffn_share"
SLICES = 4
ROUTERS = ("random", "frozen", "fitted", "label", "subset")
TUNED = ("imitation", "unguided", "frozen", "random")
CUTS = ("random", "clustered")
ARMS = [
    "dense", "dense_longer", "all_slices",
    *(f"{router}_{k}" for router in ROUTERS for k in (1, 2, 3)),
    *(f"plain_{router}_{k}" for router in ROUTERS if router != "frozen" for k in (1, 2, 3)),
    *(f"{cut}_{router}_2" for cut in CUTS for router in ("random", "fitted", "label")),
    "reverse_fitted_2",
    *(f"tuned_{arm}_{k}" for arm in TUNED for k in (1, 2)),
]  # fmt: skip
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side
METRICS = {
    "nats": {"text": "validation cross-entropy, nats per byte", "minimize": True},
    "ffn_share": {"text": "needed FFN FLOPs, routers included, over the dense network's"},
    "reconstruction": {"text": "squared error relative to the dense unit, on the dense network's states"},
    "router_change": {"text": "length of the change of the router's parameters over their length"},
    "recovered": {"text": "share of the gap to dense that fine-tuning closes"},
}  # fmt: skip
BATCHES, FIT_STEPS, QUICK_STEPS = 30, 100, 4
QUICK = ["DEPTH=1", "BATCH=4", "tasks.CodeLM.context=32", "experts.SlicedFFN.dispatch='mask'"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What sits on the ffn seam: how slices are cut and chosen, and whether their sum is rescaled."""

    router: str
    k: int
    rescale: bool = True
    cut: str = "contiguous"
    direction: str = "router"

    def factory(self) -> Any:
        """The router's class with its options."""
        if self.router == "random":
            shares = tuple(float(index == self.k - 1) for index in range(self.k))
            return functools.partial(Random, histogram=shares)
        if self.router in ("label", "subset"):
            by = "slice" if self.router == "label" else "subset"
            options = {"by": by, **({"rescale": self.rescale} if by == "subset" else {})}
            return functools.partial(Hindsight, k=self.k, **options)
        return functools.partial(DistilledRouter, k=self.k, direction=self.direction)

    def program(self) -> "Unit":
        """Units of equal programs; k is a control but for random slices."""
        router = (
            "linear"
            if self.router in ("fitted", "frozen", "imitation", "unguided")
            else self.router
        )
        return Unit(router, self.k if router == "random" else 2, self.rescale)  # fmt: skip


class Seed:
    """Trains and evaluates all arms of one seed."""

    def __init__(self, seed: int, quick: bool, workdir: Path):
        self.quick, self.workdir = quick, workdir
        suite = config.load(SLUG, QUICK if quick else [])
        change = {"seed": seed, "sweep": {}, "capture": False, "final_eval_batches": 1}
        short = {"steps": QUICK_STEPS} if quick else {}
        self.dense, self.sliced = (
            suite.runs[n].replace(**change, **short) for n in ("dense", "sliced_2")
        )
        self.programs: dict[Any, Any] = {}
        self.known: dict[Any, Any] = {}
        train(self.dense, workdir / "dense", progress=False)
        self.variables = load(workdir / "dense", self.dense).variables
        found = self.evaluator("dense", self.dense)(self.variables, "validation", self.batches)
        self.base, self.flops = found["quality"]["nll"], ffn_flops(found)

    @property
    def batches(self) -> int:
        return 1 if self.quick else BATCHES

    def unit(self, unit: Unit) -> Unit:
        """In a smoke run arms share what compiles most."""
        like = {"subset": "label", "unguided": "imitation", "frozen": "fitted"}
        return Unit(like.get(unit.router, unit.router), 2) if self.quick else unit

    def run(self, unit: Unit, **options: Any) -> Run:
        """The sliced run with another router or other options on its units."""
        block = self.sliced.model.groups[0].blocks[0]
        ffn = functools.partial(
            block.keywords["ffn"], router=unit.factory(), rescale=unit.rescale, **options
        )
        group = Group((functools.partial(block, ffn=ffn),), self.sliced.model.groups[0].repeat)
        source = InitFrom(sibling="dense", convert=SliceDense(slices=SLICES, how=unit.cut))
        return self.sliced.replace(model=self.sliced.model.clone(groups=(group,)), init_from=source)

    def trained(self, name: str, run: Run, key: Any) -> Any:
        """Variables after training; once for equal keys."""
        if key not in self.known:
            train(run, self.workdir / name, progress=False)
            self.known[key] = load(self.workdir / name, run).variables
        return self.known[key]

    def fitted(self, unit: Unit) -> Any:
        """Routers fitted by the imitation loss alone, every layer on the dense network's own states."""
        unit = self.unit(dataclasses.replace(unit, router="fitted", rescale=True))
        run = self.run(unit, states="teacher", teacher="slices", dispatch="mask").replace(
            trainable="/router/",
            objective=LMObjective(aux_weights={"imitation": 1.0}, aux_reduce="sum"),
            optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0, warmup_steps=5),
            steps=QUICK_STEPS if self.quick else FIT_STEPS,
        )
        return self.trained(f"fit_{unit.cut}_{unit.direction}_{unit.k}", run, ("fit", unit))

    def frozen(self, variables: Any, unit: Unit) -> Any:
        """The same slices with routers as they are drawn."""
        if "drawn" not in self.known:
            run, inputs = self.run(unit), np.zeros((1, 2), np.int32)
            fresh = jax.jit(lambda: nn.meta.unbox(init_variables(run.model, inputs, run.seed)))
            self.known["drawn"] = fresh()["params"]
        drawn = self.known["drawn"]
        return {**variables, "params": swap(variables["params"], drawn, "router")}

    def tuned(self, unit: Unit) -> Any:
        """Slices and, where they are taught, routers trained on."""
        if self.quick and unit.router != "random":
            unit = Unit("imitation", 2)
        unit = self.unit(unit)
        run = self.run(unit)
        if unit.router != "imitation":
            run = run.replace(objective=LMObjective())
        if unit.router in ("frozen", "random"):
            run = run.replace(trainable="/ffn/(gate|up|down)$")
        return self.trained(f"tuned_{unit.router}_{unit.k}", run, ("tuned", unit))

    def evaluator(self, key: Any, run: Run) -> Evaluator:
        return self.programs.setdefault(key, Evaluator(run))

    def figures(self, unit: Unit, variables: Any) -> dict[str, float]:
        """Loss and compute of a unit."""
        unit = self.unit(unit)
        run = self.run(unit, teacher="slices")
        evaluator = self.evaluator(unit.program(), run)
        found = evaluator(with_k(variables, unit.k), "validation", self.batches)
        return {"nats": found["quality"]["nll"], "ffn_share": ffn_flops(found) / self.flops}

    def reconstruction(self, unit: Unit, variables: Any) -> float:
        """Mean over layers and validation batches, on the dense network's states."""
        unit = self.unit(unit)
        run, key = (
            self.run(unit, states="teacher", teacher="slices", dispatch="mask"),
            unit.program(),
        )

        def call(variables: Any, inputs: Any, seed: Any) -> Any:
            rngs = {"router": jax.random.key(seed)}
            aux = apply(run.model, variables, inputs, train=True, rngs=rngs)[1]
            return aux.losses["group_0"]["block_0"]["ffn"]["reconstruction"]

        call = self.programs.setdefault(("reconstruction", key), jax.jit(call))
        source, chosen = run.task.source("validation"), with_k(variables, unit.k)
        each = [
            call(chosen, batch["inputs"], np.int32(index))
            for index, batch in enumerate(
                sequential(source, run.batch_size, self.batches // 3 or 1)
            )
        ]
        return float(np.mean(each))


def swap(params: Any, other: Any, name: str) -> Any:
    """``params`` with everything below ``name`` taken from ``other``."""
    there = dict(zip(paths(other), jax.tree.leaves(other), strict=True))
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(paths(params), leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [there[path] if f"/{name}/" in path else leaf for path, leaf in pairs]
    )


def with_k(variables: Any, k: int) -> Any:
    """The control k set, where there is one."""
    return set_controls(variables, {"k": k}) if variables["controls"] else variables


def ffn_flops(found: dict[str, Any]) -> int:
    """Needed FLOPs of the feed-forward units."""
    return sum(row["flops_needed"] for row in found["ledger"] if "/ffn/" in row["event"])


def router_change(before: Any, after: Any) -> float:
    """|after - before| / |before| over all routers."""
    pick = lambda tree: np.concatenate(
        [
            np.ravel(x)
            for p, x in zip(paths(tree), jax.tree.leaves(tree), strict=True)
            if "/router/" in p
        ]
    )
    old, new = pick(before["params"]), pick(after["params"])
    return float(np.linalg.norm(new - old) / np.linalg.norm(old))


def before(seed: Seed) -> dict[str, dict[str, float]]:
    """Part A: the dense network's slices as they are."""
    found: dict[str, dict[str, float]] = {}
    for k in (1, 2, 3):
        for router in ROUTERS:
            unit = Unit(router, k)
            variables = seed.fitted(unit)
            variables = seed.frozen(variables, unit) if router == "frozen" else variables
            found[f"{router}_{k}"] = {
                **seed.figures(unit, variables),
                "reconstruction": seed.reconstruction(unit, variables),
            }
            if router != "frozen":
                plain = dataclasses.replace(unit, rescale=False)
                found[f"plain_{router}_{k}"] = seed.figures(plain, variables)
    for cut in CUTS:
        for router in ("random", "fitted", "label"):
            unit = Unit(router, 2, cut=cut)
            variables = seed.fitted(unit)
            found[f"{cut}_{router}_2"] = {
                **seed.figures(unit, variables),
                "reconstruction": seed.reconstruction(unit, variables),
            }
    unit = Unit("fitted", 2, direction="label")
    found["reverse_fitted_2"] = seed.figures(unit, seed.fitted(unit))
    gaps = [
        found[f"subset_{k}"]["reconstruction"] - found[f"{router}_{k}"]["reconstruction"]
        for k in (1, 2, 3)
        for router in ROUTERS
    ]
    found["all_slices"] = {**every_slice(seed), "excess": max(gaps)}
    return found


def every_slice(seed: Seed) -> dict[str, float]:
    """K = N under every router."""
    variables = seed.fitted(Unit("fitted", 2))
    each = [seed.figures(Unit(router, SLICES), variables) for router in ROUTERS]
    change = max(abs(one["nats"] - seed.base) for one in each)
    return {**each[ROUTERS.index("fitted")], "largest_change": change}


def after(seed: Seed, start: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Part B: slices and routers trained on."""
    found = {}
    for arm in TUNED:
        for k in (1, 2):
            unit = Unit(arm, k)
            variables = seed.tuned(unit)
            figures = seed.figures(unit, variables)
            gap = start[f"fitted_{k}"]["nats"] - seed.base
            figures["recovered"] = (start[f"fitted_{k}"]["nats"] - figures["nats"]) / gap
            if arm != "random":
                first = seed.frozen(variables, unit)
                figures["router_change"] = router_change(first, variables)
            found[f"tuned_{arm}_{k}"] = figures
    longer = seed.sliced.replace(
        model=seed.dense.model, objective=LMObjective(), trainable="/ffn/",
        init_from=InitFrom(sibling="dense"),
    )  # fmt: skip
    variables = seed.trained("dense_longer", longer, "dense_longer")
    quality = seed.evaluator("dense", seed.dense)(variables, "validation", seed.batches)["quality"]
    return {**found, "dense_longer": {"nats": quality["nll"], "ffn_share": 1.0}}


def look(seed: Seed) -> dict[str, Any]:
    """Choices of the tuned one-slice network on validation text: by layer and kind of byte, and a piece of text."""
    unit = seed.unit(Unit("imitation", 1))
    run, variables = seed.run(unit, teacher="slices"), seed.tuned(unit)

    @jax.jit
    def call(variables: Any, inputs: Any) -> Any:
        aux = apply(run.model, variables, inputs, capture=("plan",))[1]
        return aux.plans["group_0"]["block_0"]["ffn"]["route"].experts[..., 0]

    source, text, chosen = run.task.source("validation"), [], []
    for batch in sequential(source, run.batch_size, seed.batches // 2 or 1):
        chosen.append(np.asarray(call(variables, batch["inputs"])))
        text.append(batch["inputs"].ravel())
    slices, bytes_ = np.concatenate(chosen, axis=1), np.concatenate(text)
    classes = byte_classes(bytes(bytes_.astype(np.uint8)))
    table = np.zeros((len(slices), len(CLASSES), SLICES), int)
    for layer, row in enumerate(slices):
        np.add.at(table[layer], (classes, row), 1)
    return {
        "classes": table.tolist(),
        "text": bytes_[:768].tolist(),
        "slices": slices[:, :768].tolist(),
    }


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    made = Seed(seed, quick, workdir)
    start = before(made)
    done = after(made, start)
    dense = {"nats": made.base, "ffn_share": 1.0}
    return {"dense": dense, **start, **done, "_figures": look(made)}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
