"""Routing attention (Routing Transformer, arXiv 2003.05997) on recall with distractors and on bytes of code.

Every arm is the shipped config ``routing_transformer`` with at most one thing changed, trained for the same steps on
the same examples. Quality is that of the test split; nothing was tuned on it.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp import config
from dyncomp.core.aux import flatten
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks import CLASSES, byte_classes
from dyncomp.tasks.loader import sequential
from dyncomp.training import Run
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.trackers import read_records

SLUG = "routing_transformer"
TITLE = "Routing Transformer: attention within clusters"
COMPUTE = "executed"
BOTH = ["routed", "best", "random", "hash", "local", "dense"]
CHANGED = {
    "no_commitment": ["BETA=0.0"],
    "no_balance": ["BALANCE=0.0"],
    "clusters_4": ["CLUSTERS=4", "MEMBERS=128"],
    "clusters_16": ["CLUSTERS=16", "MEMBERS=32"],
}
ARMS = [*BOTH, *CHANGED]
TRIALS = dict.fromkeys(
    ARMS, 1
)  # one setting for all; the balance's was looked at once, at half the size
METRICS = {
    "accuracy": {"text": "recalled values, test split (chance 0.0625)", "minimize": False},
    "bits": {"text": "test bits per byte of code", "minimize": True},
    "executed": {"text": "pairs computed, mean over tokens, layers, heads", "minimize": True},
    "needed": {"text": "pairs needed, mean over tokens, layers and heads", "minimize": True},
    "coverage": {
        "text": "share of routing heads and bytes that a cluster takes",
        "minimize": False,
    },
    "changed": {"text": "share of outputs that depend on later bytes", "minimize": True},
}
HEAD, HEADS, DEPTH = 16, 4, 2
BATCHES, SHOWN = 16, 512
ROUTING = ("routed", "best")
QUICK = [
    "training.Run.batch_size=2",
    "tasks.Recall.context=96",
    "tasks.Recall.gap=32",
    "tasks.CodeLM.context=64",
    "near/attention.AShape.window=8",
    "near/attention.AShape.tile=16",
    "MEMBERS=16",
]


def runs_of(seed: int, quick: bool) -> dict[str, Run]:
    """All runs by ``task_arm``; of a smoke run, those of the two memberships alone."""
    change = {"seed": seed, "capture": False, "final_eval_batches": BATCHES, "eval_every": 0}
    change |= {"steps": 3, "final_eval_batches": 1} if quick else {}
    smaller = QUICK if quick else []
    found = dict(config.load(SLUG, smaller).runs)
    for arm, override in CHANGED.items():
        names = {line.split("=")[0] for line in override}
        sized = [*(line for line in smaller if line.split("=")[0] not in names), *override]
        found[f"recall_{arm}"] = config.load(SLUG, sized).runs["recall_routed"]
    kept = [name for name in found if not quick or name.split("_", 1)[1] in ROUTING]
    return {name: found[name].replace(**change) for name in kept}


def measure(run: Run, workdir: Path) -> dict[str, float]:
    """Trains a run and evaluates it on the test split: its figures."""
    done = train(run, workdir, progress=False)
    pairs = {
        which: sum(row[f"flops_{which}"] for row in done["ledger"] if "/pair" in row["event"])
        for which in ("needed", "executed")
    }
    each = done["compute"]["elements"] * 4 * HEAD * HEADS * DEPTH
    name = "bits_per_byte" if run.task.headline == "bits_per_byte" else "accuracy"
    quality = {name.removesuffix("_per_byte"): done["quality"][name]}
    return {**quality, **{which: total / each for which, total in pairs.items()}}


def look(run: Run, variables: Any, quick: bool) -> dict[str, Any]:
    """What a model of text decides and whether it looks ahead, on the first texts of the validation split."""
    batch = next(sequential(run.task.source("validation"), 2 if quick else run.batch_size))

    @jax.jit
    def call(variables: Any, tokens: Any) -> Any:
        logits, aux = apply(run.model, variables, tokens, capture=("plan",))
        plans = [p for name, p in flatten(aux.plans).items() if name.endswith("clusters")]
        return logits, plans

    tokens = batch["inputs"]
    half = tokens.shape[1] // 2
    other = np.concatenate([tokens[:, :half], np.roll(tokens, 1, axis=0)[:, half:]], axis=1)
    (logits, plans), (moved, _) = call(variables, tokens), call(variables, other)
    gap = jnp.max(jnp.abs(logits - moved)[:, :half], axis=-1)
    return {
        "changed": float(np.mean(np.asarray(gap) > 1e-4)),
        "coverage": float(np.mean(np.asarray(plans[0].joined) > 0)),
        "nearest": np.asarray(plans[0].nearest),  # [l b h t]
        "text": tokens,
    }


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    results: dict[str, Any] = {arm: {} for arm in ARMS}
    seen: dict[str, Any] = {}
    for name, run in runs_of(seed, quick).items():
        task, arm = name.split("_", 1)
        results[arm] |= measure(run, workdir / name)
        if task == "text" and arm in ROUTING:
            seen[arm] = look(run, load(workdir / name, run).variables, quick)
            results[arm] |= {key: seen[arm][key] for key in ("changed", "coverage")}
    # Compiling sixteen programs takes minutes: in a smoke run the causal form stands for all other arms.
    results = {arm: found or results["routed"] for arm, found in results.items()}
    return {**results, "_figures": shown(seen["routed"], workdir)}


def shown(seen: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """JSON data for the pictures: clusters of a piece of code, by kind of byte, and the loss over training."""
    text, nearest = seen["text"], seen["nearest"]
    classes = byte_classes(bytes(text.astype(np.uint8).ravel()))
    layer = nearest[-1]  # [b h t]
    clusters = int(nearest.max()) + 1
    flat = np.moveaxis(layer, 1, 0).reshape(layer.shape[1], -1)  # [h, b t]
    share = [
        [np.bincount(head[classes == c], minlength=clusters).tolist() for c in range(len(CLASSES))]
        for head in flat
    ]
    curves = {
        arm: [(r["step"], r["nll"]) for r in read_records(workdir / f"recall_{arm}" / "metrics.jsonl")
              if r["split"] == "train" and "nll" in r]
        for arm in ARMS
        if (workdir / f"recall_{arm}").exists()
    }  # fmt: skip
    return {
        "text": text[0, :SHOWN].tolist(),
        "clusters": layer[0, :, :SHOWN].tolist(),
        "share": share,
        "curves": curves,
    }


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
