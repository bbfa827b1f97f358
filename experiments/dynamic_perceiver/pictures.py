"""The pictures of the page: accuracy against cost, what each exit gains and loses, and images by exit."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
EXITS = ("1: tokens,\nstage 3", "2: tokens,\nstage 4", "3: CNN", "4: both")
BARS = {
    "two_branch": "all exits trained",
    "two_branch_final": "final loss alone",
    "no_distillation": "no self-distillation",
    "feature_exit": "exit 1 on the CNN's features",
    "read_once": "tokens read the CNN once",
}
SHOWN = 12


def chosen(test: Any, exits: np.ndarray, images: np.ndarray) -> dict[str, Any]:
    """JSON data of one seed: how many of each class leave where, and the first images that do.

    Args:
      test: ``Outputs`` on the test split.
      exits: where each image leaves [n].
      images: [n h w 1].
    """
    table = np.zeros((len(EXITS), len(GARMENTS)), int)
    np.add.at(table, (exits, test.labels), 1)
    rows = np.concatenate([np.flatnonzero(exits == i)[:SHOWN] for i in range(len(EXITS))])
    low, high = images.min(), images.max()
    pixels = ((images[rows, ..., 0] - low) / (high - low) * 255).astype(int)
    said = test.said[exits, np.arange(len(exits))]
    return {
        "classes": table.tolist(), "images": pixels.tolist(), "exit": exits[rows].tolist(),
        "label": test.labels[rows].tolist(), "said": said[rows].tolist(),
    }  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"]]
    quality(results, shown, outdir / "1_accuracy_against_cost.svg")
    by_exit(results, outdir / "2_accuracy_by_exit.svg")
    places(shown, outdir / "3_where_classes_leave.svg")
    pictures(shown[0], outdir / "4_images_by_exit.png")


def quality(results: dict[str, Any], shown: list[dict[str, Any]], path: Path) -> None:
    """Sweeps of thresholds, means over seeds with their range, and every image at one exit."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    rows = (
        ("two_branch", "accuracy", "thresholds, two branches", "C0"),
        ("two_branch", "random", "random exits, same histogram", "C1"),
        ("coupled", "accuracy", "thresholds, exit on the CNN itself", "C2"),
    )
    for arm, what, label, colour in rows:
        x = np.mean([one["curves"][arm]["cost"] for one in shown], axis=0)
        y = np.asarray([one["curves"][arm][what] for one in shown])
        axes.plot(x, y.mean(axis=0), "-", color=colour, lw=1.6, label=label)
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.15, lw=0)
    for arm, colour, costs, name in (
        ("two_branch", "C0", shown[0]["costs"], "two branches"),
        ("coupled", "C2", shown[0]["coupled_costs"], "CNN"),
    ):
        figs = drawing.figures_of(results, arm)
        each = [np.mean([f[f"exit_{i}"] for f in figs]) for i in range(1, len(costs) + 1)]
        label = f"every image leaves here, {name}"
        axes.plot(costs, each, "s", color=colour, ms=5, mfc="white", label=label)
    axes.set(xlabel="mean multiply-adds (the whole two-branch network is 1)")
    axes.set(ylabel="test accuracy, percent")
    axes.legend(fontsize=8, loc="lower right")
    drawing.save(figure, path)


def by_exit(results: dict[str, Any], path: Path) -> None:
    """Accuracy of each exit on all test images under each training; bars are means, dots are seeds."""
    figure, axes = plt.subplots(figsize=(8.2, 3.6))
    low = 100.0
    for index, (arm, label) in enumerate(BARS.items()):
        exits = (4,) if arm == "two_branch_final" else range(1, 5)
        values = np.asarray(
            [[f[f"exit_{i}"] for i in exits] for f in drawing.figures_of(results, arm)]
        )
        x = np.asarray(exits) - 1 + (index - 2) * 0.16
        axes.bar(x, values.mean(axis=0), 0.15, color=f"C{index}", alpha=0.6, label=label)
        axes.plot(np.tile(x, len(values)), values.ravel(), ".", color="0.25", ms=3)
        low = min(low, values.min())
    axes.set_xticks(range(4), EXITS)
    axes.set(ylim=(np.floor(low) - 1, None), ylabel="test accuracy, percent")
    axes.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1)
    drawing.save(figure, path)


def places(shown: list[dict[str, Any]], path: Path) -> None:
    """Share of the test images that leave at each exit at p = 1 (dots: seeds), and of each class."""
    tables = np.asarray([one["classes"] for one in shown], float)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2), width_ratios=(3, 6))
    shares = tables.sum(axis=2) / tables.sum(axis=(1, 2))[:, None]
    drawing.bars(left, ["1", "2", "3", "4"], shares.tolist())
    left.set(xlabel="exit", ylabel="share of test images", title="where images leave, p = 1")
    each = tables.mean(axis=0)
    each = each / np.maximum(each.sum(axis=0), 1)
    right.imshow(each, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(each):
        shade = "white" if share > 0.6 else "black"
        right.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=shade)
    right.set(
        yticks=range(4), yticklabels=range(1, 5), ylabel="exit", title="where each class leaves"
    )
    right.set_xticks(range(len(GARMENTS)), GARMENTS, rotation=35, ha="right")
    drawing.save(figure, path)


def pictures(one: dict[str, Any], path: Path) -> None:
    """A row of images for every exit; what was said is written below, in red where it is wrong."""
    exits, images = np.asarray(one["exit"]), np.asarray(one["images"])
    figure, grid = plt.subplots(len(EXITS), SHOWN, figsize=(SHOWN * 0.72, len(EXITS) * 0.94))
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for index, row in enumerate(grid):
        for axes, place in zip(row, np.flatnonzero(exits == index), strict=False):
            wrong = one["said"][place] != one["label"][place]
            axes.imshow(images[place], cmap="gray_r")
            axes.set_xlabel(GARMENTS[one["said"][place]], fontsize=6, labelpad=1,
                            color="tab:red" if wrong else "black")  # fmt: skip
        row[0].set_ylabel(EXITS[index], rotation=0, ha="right", va="center", fontsize=7)
    figure.suptitle("leaves at exit", x=0.02, y=0.94, ha="left", fontsize=8)
    drawing.save(figure, path)
