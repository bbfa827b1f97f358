"""The pictures of the page: which keys a query sees in some draws, loss against passes, loss before and after."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

LABELS = {
    "windows": "windows (σ = 0)", "sigma_2": "σ = 2", "sigma_5": "σ = 5", "sigma_16": "σ = 16",
    "unbiased": "unbiased", "sigma_5_heads": "σ = 5, each head", "unbiased_heads": "unbiased, each head",
}  # fmt: skip
COLOURS = {0: (1.0, 1.0, 1.0), 1: (0.93, 0.6, 0.3), 2: (0.87, 0.87, 0.87), 3: (0.15, 0.3, 0.65)}


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    keys(shown[0], outdir / "1_keys_of_a_query.png")
    ensembles(shown, outdir / "2_loss_against_passes.svg")
    phases(results, outdir / "3_before_and_after.svg")
    drawing.plane(
        results,
        {**LABELS, "dense": "dense", "dense_short": "dense, as many entries"},
        outdir / "4_loss_against_attention.svg",
        x=("attention", "attention entries computed in training, over dense"),
        y=("nats", "validation nats per byte, dense evaluation"),
    )


def keys(one: dict[str, Any], path: Path) -> None:
    """A row a draw and layer, a column a byte: read (orange), drawn but later than the query (grey), itself (blue)."""
    text, query = one["text"], one["query"]
    figure, grid = plt.subplots(len(one["seen"]), 1, figsize=(11, 1.9 * len(one["seen"])))
    for axes, (name, draws) in zip(np.ravel(grid), one["seen"].items(), strict=True):
        rows = np.asarray(draws).reshape(-1, len(text))
        rows = np.where((np.arange(len(text)) > query) & (rows == 1), 2, rows)
        rows[:, query] = 3
        axes.imshow(np.asarray([[COLOURS[int(v)] for v in row] for row in rows]), aspect="auto")
        layers = len(draws[0])
        for cut in range(layers, len(rows), layers):
            axes.axhline(cut - 0.5, color="0.3", lw=0.8)
        letters = [chr(v) if 32 < v < 127 else "" for v in text]
        axes.set_xticks(range(len(text)), letters, fontsize=5, family="monospace")
        axes.set_yticks(np.arange(len(draws)) * layers + (layers - 1) / 2,
                        [f"draw {index + 1}" for index in range(len(draws))], fontsize=7)  # fmt: skip
        axes.set_title(f"{LABELS[name]}: {layers} layers of {len(draws)} draws", fontsize=8)
        axes.tick_params(length=0)
    figure.tight_layout()
    drawing.save(figure, path)


def ensembles(shown: list[dict[str, Any]], path: Path) -> None:
    """Mean over seeds of the loss of ensembles of 1 .. 16 passes, after the dense phase."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for index, (name, label) in enumerate(LABELS.items()):
        curve = np.mean([one["curves"][name] for one in shown], axis=0)
        axes.plot(np.arange(1, len(curve) + 1), curve, color=f"C{index}", marker=".", label=label)
    axes.axhline(np.mean([one["dense"] for one in shown]), color="0.4", ls="--", lw=1,
                 label="dense arm, one dense pass")  # fmt: skip
    axes.set(xlabel="sampled passes averaged", ylabel="validation nats per byte", xscale="log")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.legend(fontsize=7)
    drawing.save(figure, path)


def phases(results: dict[str, Any], path: Path) -> None:
    """Loss of sampled and dense evaluation before the dense phase, and of dense evaluation after it."""
    metrics = {
        "sampled_before": "sampled, before",
        "nats_before": "dense, before",
        "nats": "dense, after",
    }
    arms = {**LABELS, "dense": "dense"}
    figure, axes = plt.subplots(figsize=(7.6, 3.6))
    for index, (metric, label) in enumerate(metrics.items()):
        for place, arm in enumerate(arms):
            values = [f[metric] for f in drawing.figures_of(results, arm) if metric in f]
            if values:
                at = place + 0.25 * (index - 1)
                axes.bar(at, np.mean(values), 0.24, color=f"C{index}", alpha=0.7,
                         label=label if place == 0 else None)  # fmt: skip
                axes.plot([at] * len(values), values, ".", color="0.25", ms=3)
    axes.set_xticks(range(len(arms)), list(arms.values()), rotation=20, ha="right", fontsize=8)
    low = min(f["nats"] for arm in arms for f in drawing.figures_of(results, arm))
    axes.set(ylabel="validation nats per byte", ylim=(0.9 * low, None))
    axes.legend(fontsize=8)
    drawing.save(figure, path)
