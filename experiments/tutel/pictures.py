"""The pictures of the page: buffers against drops, balance over training, the needed capacity, and who is served."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

CAPACITIES = {
    "moe": "f = 1", "f_1.25": "f = 1.25", "f_2": "f = 2", "f_0": "f = 0 (adaptive)",
    "f_-1.25": "f = -1.25 (adaptive, capped)", "f_static": "smallest fixed one without drops",
}  # fmt: skip
BALANCES = {"balance_0": "weight 0", "moe": "weight 0.01", "balance_1": "weight 1"}


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    drawing.plane(
        results,
        CAPACITIES,
        outdir / "1_buffers_against_drops.svg",
        x=("slots", "rows in the experts' buffers per token"),
        y=("dropped", "tokens without a slot, percent"),
    )
    drawing.curves(
        shown, BALANCES, outdir / "2_balance_over_training.svg", y="balance loss (1: even)"
    )
    needed(shown, outdir / "3_needed_capacity.svg")
    served(shown[0], outdir / "4_who_is_served.png")


def needed(shown: list[dict[str, Any]], path: Path) -> None:
    """The largest load of each test batch: what f = 0 makes room for."""
    figure, axes = plt.subplots(figsize=(6.4, 3.0))
    for index, one in enumerate(shown):
        axes.plot(one["largest"], color=f"C{index}", lw=1)
        axes.axhline(max(one["largest"]), color=f"C{index}", lw=0.6, ls=":")
    axes.set(
        xlabel="test batch (one colour a seed; dotted: its largest)",
        ylabel="rows of the fullest expert",
    )
    drawing.save(figure, path)


def served(one: dict[str, Any], path: Path) -> None:
    """Images of one batch, first to last; each patch tinted by its expert, black where it found no slot."""
    rows = {
        "chosen": "its expert",
        "scarce_order": "f = 0.5, in order",
        "scarce_score": "f = 0.5, by score",
    }
    images = np.asarray(one["images"])
    side = int(len(one["chosen"][0]) ** 0.5)
    figure, axes = plt.subplots(len(rows), len(images), figsize=(len(images), 1.15 * len(rows)))
    tints = plt.get_cmap("tab10")
    for y, (kind, label) in enumerate(rows.items()):
        for x, image in enumerate(images):
            axis = axes[y, x]
            low, high = image.min(), image.max()
            grey = (image - low) / (high - low or 1.0)
            axis.imshow(grey, cmap="gray")
            scale = image.shape[0] // side
            colors = tints(np.asarray(one["chosen"][x]))
            colors[:, 3] = 0.4
            if kind != "chosen":
                colors[np.asarray(one["served"][kind][x]) == 0] = (0, 0, 0, 0.85)
            tint = colors.reshape(side, side, 4).repeat(scale, axis=0).repeat(scale, axis=1)
            axis.imshow(tint)
            axis.set(xticks=[], yticks=[])
        axes[y, 0].set_ylabel(label, fontsize=7)
    drawing.save(figure, path)
