"""Free experts (MoE++, arXiv 2410.07348) on a byte-level language model, against top-1, top-2 and a random choice.

Every arm is the shipped config ``moe_plus_plus`` with one thing changed, trained for the same steps on the same
batches. Quality is cross-entropy on the validation split; nothing was tuned on it.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import config
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.token_classes import CLASSES, byte_classes
from dyncomp.training import Run
from dyncomp.training.evaluate import Evaluator, experts_per_row
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.trackers import read_records

SLUG = "moe_plus_plus"
TITLE = "MoE++: experts that cost nothing"
COMPUTE = "experts"
TAUS = {"tau_010": 0.1, "tau_025": 0.25, "tau_050": 0.5, "tau_075": 0.75, "tau_100": 1.0}
CHANGED = {
    "no_residual": ["free/routers.TopK.residual=False"],
    "no_constants": ["FREE=('copy','zero')"],
}
ARMS = ["top_1", "top_2", *TAUS, *CHANGED, "random_free"]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side
METRICS = {
    "nats": {"text": "validation cross-entropy, nats per byte", "minimize": True},
    "experts": {"text": "mean networks per token and layer", "minimize": True},
    "mflops_token": {"text": "needed forward MFLOPs per token, the whole model", "minimize": True},
}
STEPS, BATCHES, PICTURE_BATCHES = 300, 100, 12
NETWORKS, FREE, K = 8, 4, 2
QUICK = [
    "DEPTH=1",
    "BATCH=4",
    "tasks.CodeLM.context=32",
    "experts.MoE.dispatch='mask'",
]  # compiles fast


def balance(tau: float) -> float:
    """Networks per token where the heterogeneous loss is at its minimum: K tau N / (tau N + Z)."""
    return K * tau * NETWORKS / (tau * NETWORKS + FREE)


def runs_of(seed: int, quick: bool) -> dict[str, Run]:
    """The arms that need no other arm first."""
    change = {"seed": seed, "sweep": {}, "capture": False, "final_eval_batches": 4, "eval_every": 0,
              "steps": 8 if quick else STEPS}  # fmt: skip
    smaller = QUICK if quick else []
    suite = config.load(SLUG, smaller).runs
    found = {"top_1": suite["top_1"], "top_2": suite["top_2"]}
    for arm, tau in TAUS.items():
        override = [f"free/experts.MoE.free_weight={tau}", *smaller]
        found[arm] = config.load(SLUG, override).runs["tau_075"]
    for arm, override in CHANGED.items():
        found[arm] = config.load(SLUG, [*override, *smaller]).runs["tau_075"]
    return {arm: run.replace(**change) for arm, run in found.items()}


def random_run(like: Run, histogram: np.ndarray, quick: bool) -> Run:
    """`like` with a random choice between networks and free experts, as often as ``histogram`` says."""
    shares = tuple(float(share) for share in histogram / histogram.sum())
    runs = {"tau_075": "free", "tau_025": "free/cheap", "top_2": "top_2", "top_1": "top_1"}
    names = ", ".join(
        f"'{n}': @{s}/training.Run()" for n, s in {**runs, "random": "free/random"}.items()
    )
    scope = "free/random/routers.RandomFree"
    overrides = [
        f"training.Suite.runs={{{names}}}",
        "free/random/experts.MoE.router=@routers.RandomFree",
        *(f"{scope}.{name}={value}" for name, value in {
            "k": K, "residual": True, "logit_std": 1.0, "null_experts": 1, "free_experts": FREE,
            "histogram": shares}.items()),
        *(QUICK if quick else []),
    ]  # fmt: skip
    run = config.load(SLUG, overrides).runs["random"]
    return like.replace(model=run.model)


def measure(run: Run, workdir: Path, quick: bool) -> dict[str, float]:
    """Trains an arm and evaluates it on the validation split."""
    train(run, workdir, progress=False)
    found = Evaluator(run)(load(workdir, run).variables, "validation", 2 if quick else BATCHES)
    compute = found["compute"]
    return {
        "nats": found["quality"]["nll"],
        "experts": float(experts_per_row(compute) or 0.0),
        "mflops_token": compute["flops_needed"] / 1e6,
    }


def look(run: Run, workdir: Path, quick: bool) -> dict[str, Any]:
    """Decisions of a trained arm on validation text: networks [l n], highest score [l n], free gates > 0 [l n f]."""
    variables = load(workdir, run).variables

    @jax.jit
    def call(variables, batch):
        _, aux = apply(run.model, variables, batch["inputs"], capture=("plan",))
        plans = aux.plans["group_0"]["block_0"]["ffn"]
        return plans["route"].counts(), plans["route"].priority, plans["free"], plans["load"]

    source, parts, text = run.task.source("validation"), [], []
    for batch in sequential(source, run.batch_size, 2 if quick else PICTURE_BATCHES):
        parts.append(jax.device_get(call(variables, batch)))
        text.append(batch["inputs"].ravel())
    counts, scores, free, loads = (np.stack(part) for part in zip(*parts, strict=True))
    join = lambda a: np.concatenate(list(a), axis=1)
    return {
        "counts": join(counts), "scores": join(scores), "free": join(free), "load": loads.sum(axis=0),
        "text": np.concatenate(text),
    }  # fmt: skip


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    runs = runs_of(seed, quick)
    results: dict[str, Any] = {arm: measure(run, workdir / arm, quick) for arm, run in runs.items()}
    seen = {arm: look(runs[arm], workdir / arm, quick) for arm in ("tau_075", "no_residual")}
    for arm, found in seen.items():
        results[arm]["score_variance"] = float(found["scores"].var(axis=0).mean())
    used = {arm: results[arm]["experts"] for arm in TAUS}
    results["tau_075"] |= {
        "inside_bounds": min(min(used[a] - balance(t), K - used[a]) for a, t in TAUS.items()),
        "over_balance": used["tau_075"] - balance(0.75),
    }
    histogram = np.bincount(seen["tau_075"]["counts"].ravel(), minlength=K + 1)
    other = random_run(runs["tau_075"], histogram, quick)
    results["random_free"] = measure(other, workdir / "random_free", quick)
    return {**results, "_figures": shown(seen["tau_075"], workdir)}


def shown(seen: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """JSON data for the pictures: networks over training, by layer and kind of token; load; a piece of text."""
    classes, each = byte_classes(bytes(seen["text"].astype(np.uint8))), seen["counts"].mean(axis=0)
    curves = {
        arm: [(r["step"], r["active_experts"]) for r in read_records(workdir / arm / "metrics.jsonl")
              if r["split"] == "train"]
        for arm in TAUS
    }  # fmt: skip
    chosen = (seen["free"] > 0).mean(
        axis=0
    )  # the zero expert's gate is 0 under this rule: see the load
    return {
        "curves": curves,
        "layers": seen["counts"].mean(axis=1).tolist(),
        "load": (seen["load"] / seen["load"].sum(axis=1, keepdims=True)).tolist(),
        "classes": {
            name: float(each[classes == index].mean())
            for index, name in enumerate(CLASSES)
            if (classes == index).any()
        },
        "free_share": chosen.mean(axis=0).tolist(),
        "text": seen["text"][:768].tolist(),
        "experts": each[:768].tolist(),
    }


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
