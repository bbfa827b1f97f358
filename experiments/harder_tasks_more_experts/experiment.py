"""Top-p expert routing (arXiv 2403.07652) on a byte-level language model, against top-1, top-2 and random experts.

Every arm is the shipped config ``harder_tasks_more_experts`` with one thing changed, trained for the same steps on the
same batches. Quality is cross-entropy on the validation split; nothing was tuned on it.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import config
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.tasks.objectives import token_nll
from dyncomp.tasks.token_classes import CLASSES, byte_classes
from dyncomp.training import Run
from dyncomp.training.evaluate import Evaluator, experts_per_row, set_controls
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.trackers import read_records

SLUG = "harder_tasks_more_experts"
TITLE = "Harder tasks need more experts"
COMPUTE = "experts"
BETAS = {"top_p": 1e-4, "top_p_beta_0": 0.0, "top_p_beta_1e-3": 1e-3, "top_p_beta_1e-2": 1e-2}
ARMS = ["top_1", "top_2", *BETAS, "random_k"]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side
METRICS = {
    "nats": {"text": "validation cross-entropy, nats per byte", "minimize": True},
    "experts": {"text": "mean active experts per token and layer", "minimize": True},
    "experts_fall": {"text": "active experts in the first tenth of training minus the last tenth"},
    "mflops_token": {"text": "needed forward MFLOPs per token, the whole model", "minimize": True},
}
SWEEP = (0.2, 0.3, 0.4, 0.6)
BATCHES, PICTURE_BATCHES = 120, 20
QUICK = [
    "DEPTH=1",
    "experts.MoE.dispatch='mask'",
]  # a smoke run mostly compiles: this compiles faster


def runs_of(seed: int, quick: bool) -> dict[str, Run]:
    """The arms that need no other arm first."""
    short = {"steps": 10} if quick else {}
    smaller = QUICK if quick else []
    change = {"seed": seed, "sweep": {}, "capture": False, "final_eval_batches": 4, "eval_every": 0}
    found = {}
    for arm, beta in BETAS.items():
        found[arm] = config.load(SLUG, [f"BETA={beta}", *smaller]).runs["top_p"]
    suite = config.load(SLUG, smaller)
    found |= {arm: suite.runs[arm] for arm in ("top_1", "top_2")}
    return {arm: run.replace(**{**change, **short}) for arm, run in found.items()}


def random_run(like: Run, histogram: np.ndarray, quick: bool) -> Run:
    """Uniformly random experts, as many a token as the finished top-p arm used; gates 1/k."""
    shares = tuple(float(share) for share in histogram / histogram.sum())
    arms = ("top_p", "top_2", "top_1", "dense", "random_k")
    names = ", ".join(f"'{arm}': @{arm}/training.Run()" for arm in arms)
    overrides = [
        f"training.Suite.runs={{{names}}}",
        "random_k/models.Block.ffn=@experts.MoE",
        "random_k/experts.MoE.router=@routers.Random",
        f"routers.Random.histogram={shares}",
        "random_k/tasks.LMObjective.aux_weights={}",
        *(QUICK if quick else []),
    ]
    return like.replace(model=(run := config.load(SLUG, overrides).runs["random_k"]).model,
                        objective=run.objective)  # fmt: skip


def measure(run: Run, workdir: Path, quick: bool) -> dict[str, float]:
    """Trains an arm and evaluates it on the validation split."""
    train(run, workdir, progress=False)
    variables = load(workdir, run).variables
    found = Evaluator(run)(variables, "validation", 2 if quick else BATCHES)
    compute = found["compute"]
    logged = [r for r in read_records(workdir / "metrics.jsonl") if r["split"] == "train"]
    over_time = np.asarray([record["active_experts"] for record in logged])
    tenth = max(len(over_time) // 10, 1)
    return {
        "nats": found["quality"]["nll"],
        "experts": float(experts_per_row(compute) or 0.0),
        "experts_fall": float(over_time[:tenth].mean() - over_time[-tenth:].mean()),
        "mflops_token": compute["flops_needed"] / 1e6,
    }


def look(run: Run, workdir: Path, quick: bool) -> dict[str, Any]:
    """Decisions of a trained top-p arm on validation text: counts [layer, token], losses, text, violations in p."""
    variables = load(workdir, run).variables

    @jax.jit
    def call(variables, batch):
        output, aux = apply(run.model, variables, batch["inputs"], capture=("plan",))
        plan = aux.plans["group_0"]["block_0"]["ffn"]["route"]
        return plan.counts(), token_nll(output, batch["targets"])

    source, counts, losses, text, sweep = run.task.source("validation"), [], [], [], []
    for batch in sequential(source, run.batch_size, 2 if quick else PICTURE_BATCHES):
        found, nll = jax.device_get(call(variables, batch))
        counts.append(found)
        losses.append(nll.ravel())
        text.append(batch["inputs"].ravel())
        tried = [call(set_controls(variables, {"p": p}), batch)[0][0] for p in SWEEP]
        sweep.append(np.stack(jax.device_get(tried)))
    joined = np.concatenate(sweep, axis=1)
    return {
        "counts": np.concatenate(counts, axis=1), "losses": np.concatenate(losses),
        "text": np.concatenate(text), "violations": (np.diff(joined, axis=0) < 0).any(axis=0),
    }  # fmt: skip


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    runs = runs_of(seed, quick)
    results: dict[str, Any] = {arm: measure(run, workdir / arm, quick) for arm, run in runs.items()}
    seen = look(runs["top_p"], workdir / "top_p", quick)
    each = seen["counts"].mean(axis=0)
    results["top_p"] |= {
        "p_violations": float(seen["violations"].mean()),
        "correlation": float(np.corrcoef(each, seen["losses"])[0, 1]),
    }
    histogram = np.bincount(seen["counts"].ravel())[1:]
    results["random_k"] = measure(
        random_run(runs["top_1"], histogram, quick), workdir / "random_k", quick
    )
    return {**results, "_figures": shown(seen, workdir)}


def shown(seen: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """JSON data for the pictures: experts over training, by layer, by kind of token, and a piece of text."""
    classes, each = byte_classes(bytes(seen["text"].astype(np.uint8))), seen["counts"].mean(axis=0)
    logged = {arm: read_records(workdir / arm / "metrics.jsonl") for arm in (*BETAS, "top_2")}
    curves = {
        arm: [(r["step"], r["active_experts"]) for r in records if r["split"] == "train"]
        for arm, records in logged.items()
    }
    return {
        "curves": curves,
        "layers": seen["counts"].mean(axis=1).tolist(),
        "classes": {
            name: float(each[classes == index].mean())
            for index, name in enumerate(CLASSES)
            if (classes == index).any()
        },
        "text": seen["text"][:768].tolist(),
        "experts": each[:768].tolist(),
    }


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
