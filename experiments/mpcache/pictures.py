"""The pictures of the page: loss against tokens read, recalled mass, and what is kept of a real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

CURVES = {
    "sink + window": ("window_128", "window_256"), "heavy hitters": ("hitters_128", "hitters_256"),
    "eviction only": ("static_128", "static_256"), "selection only": ("dynamic_128", "dynamic_256"),
    "75% kept, then selection": ("both_75_128", "both_75_256"),
}  # fmt: skip
ALONE = {
    "both_50_128": "50% kept", "both_30_128": "30% kept", "levels_128": "75%, two levels",
    "shared_128": "75%, two levels, shared", "bound_128": "bound (Quest)", "best_128": "oracle",
    "mean_128": "mean key", "random_128": "random",
}  # fmt: skip
RECALL = {
    "best_128": "oracle", "bound_128": "bound", "alpha_5": "linear .5", "dynamic_128": "linear .6",
    "alpha_3": "linear .3", "alpha_10": "linear 1", "alpha_0": "linear 0", "levels_128": "two levels",
    "mean_128": "mean key", "random_128": "random",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    loss(results, outdir / "1_loss.svg")
    recall(results, outdir / "2_recall.svg")
    shown = next(run["shown"] for run in results["runs"] if run.get("shown"))
    what = {"stayed": "share of layers that keep the token (50% each)",
            "read": "share of layers' lists in which the last query reads the token"}  # fmt: skip
    for number, (name, text) in enumerate(what.items(), 3):
        part = {"values": shown["text"][-2200:], "shades": shown[name][-2200:]}
        drawing.shaded_text(**part, path=outdir / f"{number}_{name}.png", what=text)


def loss(results: dict[str, Any], path: Path) -> None:
    """Mean over seeds; two budgets are joined."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    mean = lambda arm: [
        np.mean([f[key] for f in drawing.figures_of(results, arm)]) for key in ("read", "extra")
    ]
    for label, arms in CURVES.items():
        axes.plot(*zip(*map(mean, arms), strict=True), "o-", label=label)
    for arm, label in ALONE.items():
        axes.plot(*mean(arm), "x", label=label)
    axes.axhline(0, color="0.6", lw=1)
    axes.set(
        xlabel="tokens that a query head reads", ylabel="nats a token above reading everything"
    )
    axes.set_yscale("symlog", linthresh=0.1)
    axes.legend(fontsize=7, ncols=2)
    drawing.save(figure, path)


def recall(results: dict[str, Any], path: Path) -> None:
    """Mass in a quarter of the clusters."""
    figure, axes = plt.subplots(figsize=(7, 3))
    seeds = [[run["arms"][arm]["figures"]["recall"] for arm in RECALL] for run in results["runs"]]
    drawing.bars(axes, list(RECALL.values()), seeds)
    axes.tick_params(axis="x", rotation=30)
    axes.set(ylabel="attention mass")
    drawing.save(figure, path)
