"""Adaptive capacity, batch priority and balance (Tutel, arXiv 2206.03382) on Fashion-MNIST.

Six networks are trained: dense, and the mixture of the shipped config ``tutel`` with one thing changed. The trained
mixture is then evaluated at other capacities. Nothing was tuned on either side. Slots, drops and imbalance come from
the plans of whole test batches, counted here with Tutel's own rule; accuracies from running the network so.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import config
from dyncomp.core import dispatch
from dyncomp.evidence.seed import load_module
from dyncomp.experts.capacity import tutel_slots
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.training import Run
from dyncomp.training.evaluate import Evaluator
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.trackers import read_records

SLUG = "tutel"
TITLE = "Mixture of experts with adaptive capacity and parallelism"
COMPUTE = "slots"
TRAINED = {
    "moe": [],
    "balance_0": ["BALANCE=0.0"],
    "balance_1": ["BALANCE=1.0"],
    "trained_order": ["FACTOR=0.5"],
    "trained_score": ["FACTOR=0.5", "PRIORITY='score'"],
}
FACTORS = {"f_1.25": 1.25, "f_2": 2.0, "f_0": 0.0, "f_-1.25": -1.25}
SCARCE = {"scarce_order": "choice", "scarce_score": "score"}
ARMS = ["dense", *TRAINED, *FACTORS, "f_static", *SCARCE]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side
METRICS = {
    "accuracy": {"text": "percent of the test images"},
    "slots": {"text": "rows in the experts' buffers per token sent", "minimize": True},
    "dropped": {"text": "percent of tokens without a slot", "minimize": True},
    "imbalance": {"text": "fullest expert over the mean, mean over test batches", "minimize": True},
    "kflops_image": {"text": "executed forward kFLOPs of a test image", "minimize": True},
}
EXPERTS, PICTURES = 8, 12


def make(overrides: list[str], seed: int, quick: bool, arm: str = "moe") -> Run:
    """A run of the shipped config with some lines changed."""
    short = {"steps": 10, "final_eval_batches": 1} if quick else {"final_eval_batches": 4}
    change = {"seed": seed, "capture": False, "eval_every": 0}
    return config.load(SLUG, overrides).runs[arm].replace(**change, **short)


def tested(run: Run, variables: Any, quick: bool) -> dict[str, float]:
    """Accuracy and executed FLOPs on the test set."""
    found = Evaluator(run)(variables, "test", 2 if quick else None)
    return {
        "accuracy": 100.0 * found["quality"]["accuracy"],
        "kflops_image": found["compute"]["flops_executed"] / 1e3,
    }


def plans(run: Run, variables: Any, quick: bool) -> list[dict[str, Any]]:
    """Plans (experts, gates) and inputs of all whole test batches."""

    @jax.jit
    def call(variables, inputs):
        _, aux = apply(run.model, variables, inputs, capture=("plan",))
        route = aux.plans["group_0"]["block_1"]["ffn"]["route"]
        return route.experts[0], route.weights[0]

    source, found = run.task.source("test"), []
    for batch in sequential(source, run.batch_size, 2 if quick else len(source) // run.batch_size):
        experts, gates = jax.device_get(call(variables, batch["inputs"]))
        found.append({"experts": experts, "gates": gates, "inputs": batch["inputs"]})
    return found


def loads(seen: list[dict[str, Any]]) -> np.ndarray:
    """Rows of each expert in each batch, int [batch, e]."""
    return np.stack([np.bincount(p["experts"].ravel(), minlength=EXPERTS) for p in seen])


def counted(load: np.ndarray, factor: float, fixed: int | None = None) -> dict[str, float]:
    """Buffers and drops of every batch under a capacity factor (or a fixed capacity), and the load's imbalance."""
    rows = int(load[0].sum())
    of = lambda one: fixed or tutel_slots(rows, EXPERTS, 1, factor, int(one.max()))
    slots = np.array([of(one) for one in load])
    dropped = np.maximum(load - slots[:, None], 0).sum()
    return {
        "slots": float(EXPERTS * slots.mean() / rows),
        "dropped": float(100.0 * dropped / load.sum()),
        "imbalance": float((load.max(axis=1) / load.mean(axis=1)).mean()),
    }


def at_other_capacities(variables: Any, load: np.ndarray, seed: int, quick: bool) -> dict[str, Any]:
    """Arms that evaluate the trained mixture."""
    run = lambda *overrides: tested(make(list(overrides), seed, quick), variables, quick)
    free = run(
        "experts.MoE.dispatch='dropless'"
    )  # what f = 0 and a static capacity that suffices compute
    found = {"f_0": {**counted(load, 0.0), **free}}
    found["f_static"] = {**counted(load, 1.0, fixed=int(load.max())), **free}
    found["f_2"] = {**counted(load, 2.0), **run("FACTOR=2.0")}
    found["f_1.25"] = {**counted(load, 1.25), **run("FACTOR=1.25")}
    found["f_-1.25"] = {**found["f_1.25"], **counted(load, -1.25)}  # the same tokens find a slot
    for arm, priority in SCARCE.items():
        found[arm] = {
            **counted(load, 0.5), **run("FACTOR=0.5", f"PRIORITY='{priority}'"),
        }  # fmt: skip
    return found


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    dense = make([], seed, quick, "dense")
    train(dense, workdir / "dense", progress=False)
    results: dict[str, Any] = {
        "dense": tested(dense, load(workdir / "dense", dense).variables, quick)
    }
    shown: dict[str, Any] = {"curves": {}}
    for arm, overrides in TRAINED.items():
        run = make(overrides, seed, quick)
        train(run, workdir / arm, progress=False)
        variables = load(workdir / arm, run).variables
        seen = plans(run, variables, quick)
        factor = 0.5 if arm.startswith("trained") else 1.0
        results[arm] = {**counted(loads(seen), factor), **tested(run, variables, quick)}
        shown["curves"][arm] = [
            (r["step"], r["balance_first"])
            for r in read_records(workdir / arm / "metrics.jsonl")
            if r["split"] == "train"
        ]
        if arm == "moe":
            results |= at_other_capacities(variables, loads(seen), seed, quick)
            shown |= decisions(seen[0]) | {"largest": loads(seen).max(axis=1).tolist()}
    return {**results, "_figures": shown}


def decisions(one: dict[str, Any]) -> dict[str, Any]:
    """JSON data of one batch at f = 0.5: some images, their experts, and who is served under each priority."""
    n = one["experts"].shape[0]
    slots, shown = tutel_slots(n, EXPERTS, 1, 0.5, n), {}
    plan = dispatch.RoutePlan(
        one["experts"], one["gates"], np.ones((n, 1), bool), one["gates"][:, 0]
    )
    for arm, priority in SCARCE.items():
        kept, _ = dispatch.limit(
            jax.tree.map(jax.numpy.asarray, plan), jax.numpy.full((EXPERTS,), slots), priority
        )
        shown[arm] = np.asarray(kept.keep).reshape(len(one["inputs"]), -1)
    where = np.linspace(0, len(one["inputs"]) - 1, PICTURES).astype(int)
    return {
        "served": {arm: kept[where].astype(int).tolist() for arm, kept in shown.items()},
        "chosen": one["experts"].reshape(len(one["inputs"]), -1)[where].tolist(),
        "images": np.round(one["inputs"][where, ..., 0], 2).tolist(),
    }


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
