"""Bi-level routing attention (arXiv 2303.08810): tiles whose answer lies on a twin tile, and garments at 56 pixels.

All arms are trained alike: the shipped configs ``biformer`` and ``biformer_garments`` with one thing changed. Routed,
local and random arms read as many keys a token. Nothing was tuned on either side; figures are of the test split.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dyncomp import config
from dyncomp.attention import RegionPlan
from dyncomp.core.aux import flatten
from dyncomp.evidence.seed import load_module
from dyncomp.models import apply
from dyncomp.tasks.loader import sequential
from dyncomp.training import Run
from dyncomp.training.evaluate import Evaluator
from dyncomp.training.loop import train
from dyncomp.training.restore import load
from dyncomp.training.trackers import read_records

TITLE = "Bi-level routing attention"
COMPUTE = "attention"
TILES = {
    "routed": ("routed", []),
    "dense": ("dense", []),
    "local": ("local", []),
    "random": ("random", []),
    "top_1": ("routed", ["TOP=1"]),
    "top_2": ("routed", ["TOP=2"]),
    "top_8": ("routed", ["TOP=8"]),
    "soft": ("routed", ["ROUTING='soft_learned'"]),
}
GARMENTS = {f"garments_{run}": run for run in ("routed", "dense", "local", "random")}
ARMS = [*TILES, *GARMENTS]
TRIALS = dict.fromkeys(ARMS, 1)  # nothing was tuned, on either side
REPEATED = {
    **dict.fromkeys(("top_1", "top_2", "top_8"), "routed"),
    **dict.fromkeys(("garments_local", "garments_random"), "garments_routed"),
}
"""In a smoke run, which must be short, these arms repeat the figures of another one."""
METRICS = {
    "accuracy": {"text": "percent of the patches (tiles) or images (garments) of the test split"},
    "blank": {"text": "percent of the patches on blank tiles"},
    "far": {"text": "percent of the patches on blank tiles whose twin is three tiles away"},
    "found": {"text": "percent of the blank tiles whose twin the last block reads"},
    "pairs": {"text": "query-key pairs of an image, all blocks", "minimize": True},
    "attention": {"text": "kFLOPs of pairs and of routing, an image", "minimize": True},
    "kflops_image": {"text": "executed forward kFLOPs of a test image", "minimize": True},
}
ATTENTION = ("pairs", "pair_blocks", "region_pairs", "pooled")
GARMENTS_SHOWN = 3


def make(slug: str, arm: str, overrides: list[str], seed: int, quick: bool) -> Run:
    """A run of a shipped config with some lines changed."""
    short = {"steps": 6, "final_eval_batches": 1} if quick else {"final_eval_batches": 4}
    change = {"seed": seed, "capture": False, "eval_every": 0}
    return config.load(slug, overrides).runs[arm].replace(**change, **short)


def trained(run: Run, workdir: Path) -> Any:
    """Trains; returns the variables."""
    train(run, workdir, progress=False)
    return load(workdir, run).variables


def tested(run: Run, variables: Any, quick: bool) -> dict[str, float]:
    """Quality and work on the test split."""
    found = Evaluator(run)(variables, "test", 2 if quick else None)
    images = found["compute"]["elements"]
    rows = [(row["event"].rsplit("/", 1)[-1], row) for row in found["ledger"]]
    scale = {"pairs": 1, "pair_blocks": 16_384}
    quality = found["quality"]
    named = {"accuracy": "accuracy", "accuracy_blank": "blank", "accuracy_far": "far"}
    return {
        **{new: 100.0 * quality[old] for old, new in named.items() if old in quality},
        "pairs": sum(scale.get(name, 0) * row["needed"] for name, row in rows) / images,
        "attention": sum(row["flops_needed"] for name, row in rows if name in ATTENTION)
        / images
        / 1e3,
        "kflops_image": found["compute"]["flops_executed"] / 1e3,
    }


def choices(run: Run, variables: Any, batches: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Test batches, and for each the regions [l b r k] that the blocks' regions read, by path of the plan."""

    @jax.jit
    def call(variables, inputs):
        _, aux = apply(run.model, variables, inputs, capture=("plan",))
        plans = flatten(aux.plans)
        return {path: plan.index for path, plan in plans.items() if isinstance(plan, RegionPlan)}

    seen = list(sequential(run.task.source("test"), run.batch_size, batches))
    return seen, [jax.device_get(call(variables, batch["inputs"])) for batch in seen]


def per_tile(values: np.ndarray, side: int) -> np.ndarray:
    """Of what is the same at all patches of a tile, [b t] to [b tiles]."""
    rows = int(values.shape[1] ** 0.5)
    step = rows // side
    return values.reshape(-1, rows, rows)[:, ::step, ::step].reshape(len(values), -1)


def found_rate(batches: list[dict[str, Any]], indices: list[Any], side: int) -> float:
    """Percent of blank tiles whose twin is among the regions that the last block reads."""
    hits = total = 0
    for batch, by_path in zip(batches, indices, strict=True):
        (index,) = by_path.values()
        twin, blank = per_tile(batch["twin"], side), per_tile(batch["distance"], side) > 0
        hit = (index[-1] == twin[..., None]).any(axis=-1)
        hits, total = hits + int((hit & blank).sum()), total + int(blank.sum())
    return 100.0 * hits / total


def routes(
    batch: dict[str, Any], by_path: Any, levels: tuple[float, float], images: int
) -> dict[str, Any]:
    """JSON data of the first images of a batch: pixels 0..255 and what the last routed block's regions read."""
    (index,) = by_path.values()
    low, high = levels
    pixels = np.clip((batch["inputs"][:images] - low) / (high - low), 0, 1) * 255
    return {"images": pixels.astype(int).tolist(), "index": index[-1][:images].tolist()}


def tiles(seed: int, quick: bool, workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arms on tiles, and what the pictures show of them."""
    results, shown = {}, {"curves": {}}
    for arm, (name, overrides) in TILES.items():
        if quick and arm in REPEATED:
            results[arm] = results[REPEATED[arm]]
            continue
        run = make("biformer", name, overrides, seed, quick)
        variables = trained(run, workdir / arm)
        results[arm] = tested(run, variables, quick)
        shown["curves"][arm] = [
            (record["step"], record["nll"])
            for record in read_records(workdir / arm / "metrics.jsonl")
            if record["split"] == "train"
        ]
        if arm == "dense":
            results[arm]["found"] = 100.0
            continue
        batches, indices = choices(run, variables, 2 if quick else 30)
        results[arm]["found"] = found_rate(batches, indices, run.task.side)
        if arm in ("routed", "local", "random"):
            shown[arm] = routes(batches[0], indices[0], (-1.0, 1.0), 1)
    return results, shown


def garments(seed: int, quick: bool, workdir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arms on whole images, and routes of the first few."""
    results, shown = {}, {}
    for arm, name in GARMENTS.items():
        if quick and arm in REPEATED:
            results[arm] = results[REPEATED[arm]]
            continue
        run = make("biformer_garments", name, [], seed, quick)
        variables = trained(run, workdir / arm)
        results[arm] = tested(run, variables, quick)
        if name == "routed":
            batches, indices = choices(run, variables, 1)
            pixels = batches[0]["inputs"]
            levels = float(pixels.min()), float(pixels.max())
            shown[arm] = routes(batches[0], indices[0], levels, GARMENTS_SHOWN)
    return results, shown


def run_seed(seed: int, quick: bool, workdir: Path) -> dict[str, Any]:
    """All arms of one seed: arm -> metric -> value; ``_figures`` holds what the pictures show."""
    found, shown = tiles(seed, quick, workdir)
    more, also = garments(seed, quick, workdir)
    return {**found, **more, "_figures": {**shown, **also}}


def figures(results: dict[str, Any], outdir: Path) -> None:
    """Writes the pictures of the page; drawing is in ``pictures.py``."""
    load_module(Path(__file__).with_name("pictures.py")).draw(results, outdir)
