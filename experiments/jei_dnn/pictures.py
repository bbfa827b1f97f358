"""The pictures of the page: accuracy against cost, where images leave, and the images themselves."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

LAMBDAS = ("0.05", "0.2", "0.5", "1", "2")
METHODS = {
    "oracle": "best exit in hindsight",
    "jei": "learned gates, joint training",
    "threshold": "confidence threshold, same heads",
    "official": "learned gates, released code's weighting",
    "uniform": "learned gates, uniform heads",
    "random": "random exits, same histogram",
}
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
WRONG = "tab:red"


def chosen(out: Any, images: np.ndarray, costs: np.ndarray, per_exit: int = 12) -> dict[str, Any]:
    """What the pictures show of one seed: how many of each class leave where, and the first images that do.

    Args:
      out: ``Outputs`` of the learned gates on the test split.
      images: of the same split [n h w 1].
      costs: cumulative cost [x] of every exit.
      per_exit: images kept of each exit.
    """
    exits, classes = len(out.probabilities), out.probabilities.shape[-1]
    table = np.zeros((exits, classes), int)
    np.add.at(table, (out.exits, out.labels), 1)
    rows = np.concatenate([np.flatnonzero(out.exits == i)[:per_exit] for i in range(exits)])
    said = out.probabilities[out.exits, np.arange(len(out.exits))].argmax(-1)
    return {
        "classes": table, "costs": costs, "images": images[rows], "exit": out.exits[rows],
        "label": out.labels[rows], "said": said[rows],
    }  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    root = Path(results["workdir"])
    names = [
        root / f"seed_{run['seed']}" / f"decisions_{run['seed']}.npz" for run in results["runs"]
    ]
    seen = [dict(np.load(name)) for name in names]
    quality(results, seen[0]["costs"], outdir / "1_accuracy_against_cost.svg")
    places(seen, outdir / "2_where_classes_leave.svg")
    pictures(seen[0], outdir / "3_images_by_exit.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)


def figures_of(results: dict[str, Any], arm: str, metric: str) -> np.ndarray:
    """An arm's figure in every seed."""
    return np.asarray([run["arms"][arm]["figures"][metric] for run in results["runs"]])


def quality(results: dict[str, Any], costs: np.ndarray, path: Path) -> None:
    """Every way to leave over the five lambdas, mean and range of the seeds; heads alone and the whole network."""
    figure, axes = plt.subplots(figsize=(7.2, 4.8))
    for index, (method, label) in enumerate(METHODS.items()):
        arms = [f"{method}_{lam}" for lam in LAMBDAS]
        x = np.stack([figures_of(results, arm, "cost") for arm in arms])
        y = np.stack([figures_of(results, arm, "accuracy") for arm in arms])
        mean = y.mean(axis=1)
        span = [mean - y.min(axis=1), y.max(axis=1) - mean]
        axes.errorbar(x.mean(axis=1), mean, span, fmt="o-", color=f"C{index}", ms=4, lw=1.2,
                      capsize=2, label=label)  # fmt: skip
    heads = [figures_of(results, "static", f"head_{i}").mean() for i in range(len(costs))]
    axes.plot(costs, heads, "s--", color="0.5", ms=4, lw=1, label="every image leaves here")
    axes.set(xlabel="mean cost (the whole network is 1)", ylabel="test accuracy, percent")
    axes.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def places(seen: list[dict[str, Any]], path: Path) -> None:
    """Share of the test images that leave at each exit (dots: seeds), and of each class (mean over seeds)."""
    tables = np.stack([one["classes"] for one in seen]).astype(float)
    names = _exit_names(tables.shape[1])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), width_ratios=(3, 6))
    shares = tables.sum(axis=2) / tables.sum(axis=(1, 2))[:, None]
    left.bar(names, shares.mean(axis=0), color="C0", alpha=0.6)
    for row in shares:
        left.plot(names, row, ".", color="0.25", ms=4)
    left.set(xlabel="exit", ylabel="share of test images", title="where images leave")
    each = tables.mean(axis=0)
    each = each / np.maximum(each.sum(axis=0), 1)
    right.imshow(each, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(each):
        shade = "white" if share > 0.6 else "black"
        right.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=shade)
    right.set(yticks=range(len(names)), yticklabels=names, ylabel="exit")
    right.set(title="where each class leaves")
    right.set_xticks(range(len(GARMENTS)), GARMENTS, rotation=35, ha="right")
    _save(figure, path)


def _exit_names(exits: int) -> list[str]:
    return [*(str(index + 1) for index in range(exits - 1)), "end"]


def pictures(one: dict[str, Any], path: Path) -> None:
    """A row of images for every exit; what was said is written below, in red where it is wrong."""
    exits = len(one["costs"])
    columns = int(np.bincount(one["exit"], minlength=exits).max())
    figure, grid = plt.subplots(
        exits, columns, figsize=(columns * 0.72, exits * 0.92), squeeze=False
    )
    names = _exit_names(exits)
    for index, row in enumerate(grid):
        mine = np.flatnonzero(one["exit"] == index)
        for axes, place in zip(row, [*mine, *[None] * (columns - len(mine))], strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if place is None:
                continue
            wrong = one["said"][place] != one["label"][place]
            axes.imshow(one["images"][place, ..., 0], cmap="gray_r")
            axes.set_xlabel(GARMENTS[one["said"][place]], fontsize=6, labelpad=1,
                            color=WRONG if wrong else "black")  # fmt: skip
        row[0].set_ylabel(names[index], rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("leaves at exit", x=0.02, y=0.93, ha="left", fontsize=9)
    _save(figure, path)
