"""The pictures of the page: accuracy against steps, thresholds, where classes stop, and images by step."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence.drawing import save
from dyncomp.exits import leaves_above

WAYS = {
    "1": "temperature 1",
    "10": "temperature 10",
    "30": "temperature 30 (the paper's code)",
    "100": "temperature 100",
    "mean": "mean of the logits",
}
NETWORKS = {"": "converted", "direct_": "trained through time"}
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
SHOWN = "1"
"""The way to stop whose decisions are drawn, at the threshold that keeps the accuracy."""
WRONG = "tab:red"
COLUMNS, ROWS = 12, 8


def chosen(judge: Any, images: np.ndarray, results: dict[str, Any]) -> dict[str, Any]:
    """What the pictures show of one network: curves, and where images of each class stop.

    Args:
      judge: ``Judge`` of the experiment.
      images: of the test split [n h w 1].
      results: figures of its arms, thresholds included.
    """
    prefix, test = judge.setup.prefix, judge.test
    found = {"fixed": np.stack([judge.steps, 100.0 * test.right.mean(axis=0)], axis=1)}
    for way in WAYS:
        found[f"front_{way}"], found[f"sweep_{way}"] = judge.front(way), judge.sweep(way)
    scores = test.confidences(SHOWN).max(-1).T
    stops = leaves_above(scores, results[f"{prefix}dynamic_{SHOWN}"]["threshold"])
    table = np.zeros((len(judge.steps), len(GARMENTS)), int)
    np.add.at(table, (stops, test.labels), 1)
    rows = np.concatenate([np.flatnonzero(stops == i)[:COLUMNS] for i in range(len(judge.steps))])
    found |= {
        "classes": table, "images": images[rows], "stop": stops[rows], "label": test.labels[rows],
        "said": test.sums.argmax(-1)[stops[rows], rows],
    }  # fmt: skip
    return {f"{prefix}{name}": values for name, values in found.items()}


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    root = Path(results["workdir"])
    names = [
        root / f"seed_{one['seed']}" / f"decisions_{one['seed']}.npz" for one in results["runs"]
    ]
    seen = [dict(np.load(name)) for name in names]
    quality(results, seen, outdir / "1_accuracy_against_steps.svg")
    thresholds(seen, outdir / "2_accuracy_against_threshold.svg")
    places(seen, outdir / "3_where_classes_stop.svg")
    pictures(seen[0], outdir / "4_images_by_step.png")


def mean_of(results: dict[str, Any], arm: str, metric: str) -> float:
    """An arm's figure, mean over seeds."""
    return float(np.mean([run["arms"][arm]["figures"][metric] for run in results["runs"]]))


def between(curves: list[np.ndarray], at: np.ndarray) -> np.ndarray:
    """Mean over seeds of curves of (x, y), read off at the same x; only where every seed has some."""
    read = [np.interp(at, *curve.T, left=np.nan, right=np.nan) for curve in curves]
    return np.mean(read, axis=0)


def quality(results: dict[str, Any], seen: list[dict[str, Any]], path: Path) -> None:
    """Both networks: all images after the same step, the fronts of each temperature, random stops, the oracle."""
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.4))
    for axes, (prefix, title) in zip(panels, NETWORKS.items(), strict=True):
        fixed = np.mean([one[f"{prefix}fixed"] for one in seen], axis=0)
        axes.plot(*fixed.T, "s--", color="0.5", ms=4, lw=1, label="all after the same step")
        at = np.geomspace(1.0, fixed[-1, 0], 80)
        for index, (way, label) in enumerate(WAYS.items()):
            curve = between([one[f"{prefix}front_{way}"] for one in seen], at)
            axes.plot(at, curve, color=f"C{index}", lw=1.4, label=label)
            kept = [mean_of(results, f"{prefix}dynamic_{way}", m) for m in ("steps", "accuracy")]
            axes.plot(*kept, "o", color=f"C{index}", ms=6)
        chance = [f"{prefix}random_{name}_1" for name in ("early", "dynamic")]
        points = np.asarray(
            [[mean_of(results, a, m) for m in ("steps", "accuracy")] for a in chance]
        )
        axes.plot(
            *points.T, "x", color="black", ms=7, label="random stops, histograms of temperature 1"
        )
        oracle = [mean_of(results, f"{prefix}oracle", m) for m in ("steps", "accuracy")]
        axes.plot(*oracle, "*", color="tab:olive", ms=12, label="first right step (oracle)")
        axes.set(xlabel="mean steps of time", ylabel="test accuracy, percent", title=title)
        axes.set_xscale("log")
        ticks = [t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 24) if t <= fixed[-1, 0]]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    panels[0].legend(fontsize=7.5, loc="lower right")
    save(figure, path)


def thresholds(seen: list[dict[str, Any]], path: Path) -> None:
    """The converted network: accuracy and mean steps at every threshold, mean over seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    for index, (way, label) in enumerate(WAYS.items()):
        steps, accuracy = np.mean([one[f"sweep_{way}"] for one in seen], axis=0).T
        at = 0.3 + 0.05 * np.arange(len(steps))
        left.plot(at, accuracy, ".-", color=f"C{index}", label=label)
        right.plot(at, steps, ".-", color=f"C{index}", label=label)
    left.set(xlabel="threshold", ylabel="test accuracy, percent")
    right.set(xlabel="threshold", ylabel="mean steps of time")
    left.legend(fontsize=7.5)
    save(figure, path)


def places(seen: list[dict[str, Any]], path: Path) -> None:
    """The converted network: share of the test images that stop at each step, and the mean step of each class."""
    tables = np.stack([one["classes"] for one in seen]).astype(float)
    steps = np.arange(1, tables.shape[1] + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    shares = tables.sum(axis=2) / tables.sum(axis=(1, 2))[:, None]
    left.bar(steps, shares.mean(axis=0), color="C0", alpha=0.6)
    for row in shares:
        left.plot(steps, row, ".", color="0.25", ms=3)
    left.set(xlabel="stops after step", ylabel="share of test images", yscale="log")
    means = (tables * steps[None, :, None]).sum(axis=1) / tables.sum(axis=1)
    order = np.argsort(means.mean(axis=0))
    right.bar(range(len(order)), means.mean(axis=0)[order], color="C0", alpha=0.6)
    for row in means:
        right.plot(range(len(order)), row[order], ".", color="0.25", ms=4)
    right.set(ylabel="mean steps")
    right.set_xticks(range(len(order)), [GARMENTS[i] for i in order], rotation=35, ha="right")
    save(figure, path)


def pictures(one: dict[str, Any], path: Path) -> None:
    """A row of images for steps at which some stop; what was said stands below, in red where it is wrong."""
    there = np.unique(one["stop"])
    shown = there if len(there) <= ROWS else np.append(there[: ROWS - 1], there[-1])
    figure, grid = plt.subplots(len(shown), COLUMNS, figsize=(COLUMNS * 0.72, len(shown) * 0.92))
    for step, row in zip(shown, np.atleast_2d(grid), strict=True):
        mine = np.flatnonzero(one["stop"] == step)[:COLUMNS]
        for axes, place in zip(row, [*mine, *[None] * (COLUMNS - len(mine))], strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if place is None:
                continue
            wrong = one["said"][place] != one["label"][place]
            axes.imshow(one["images"][place, ..., 0], cmap="gray_r")
            axes.set_xlabel(GARMENTS[one["said"][place]], fontsize=6, labelpad=1,
                            color=WRONG if wrong else "black")  # fmt: skip
        row[0].set_ylabel(str(step + 1), rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("stops after step", x=0.02, y=0.91, ha="left", fontsize=9)
    save(figure, path)
