"""The pictures of the page: latency over exit rates, images by exit, which blocks ran, and parts switched off."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

RATES = (0, 25, 50, 75, 100)
PER_EXIT, SHOWN = 9, 8


def chosen(images: np.ndarray, exits: Any, skips: Any) -> dict[str, Any]:
    """What the pictures show of one seed, as JSON.

    Args:
      images: [b h w 1] of the agreement runs.
      exits, skips: what masked execution did with them.
    """
    grey = ((images - images.min()) / np.ptp(images) * 255).astype(int)[..., 0]
    left = exits.visits.sum(1) - 1
    rows = [
        int(n) for e in range(exits.visits.shape[1]) for n in np.flatnonzero(left == e)[:PER_EXIT]
    ]
    return {
        "images": {str(n): grey[n].tolist() for n in {*rows, *range(SHOWN)}},
        "left": left.tolist(), "rows": rows, "opened": skips.visits[:SHOWN].tolist(),
    }  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = results["runs"][0]["shown"]
    latency(results, outdir / "1_latency_over_exit_rates.svg")
    by_exit(shown, outdir / "2_images_by_exit.png")
    skipped(shown, outdir / "3_blocks_that_ran.png")
    parts(results, outdir / "4_with_parts_switched_off.svg")


def of(results: dict[str, Any], arm: str, metric: str) -> np.ndarray:
    """An arm's figure in every seed."""
    return np.asarray([run["arms"][arm]["figures"][metric] for run in results["runs"]])


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)


def latency(results: dict[str, Any], path: Path) -> None:
    """Milliseconds at batch 1: host over rates, its rivals as levels."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    y = np.stack([of(results, f"host_{rate}", "ms") for rate in RATES])
    mean = y.mean(axis=1)
    span = [mean - y.min(axis=1), y.max(axis=1) - mean]
    axes.errorbar(RATES, mean, span, fmt="o-", color="C0", capsize=2, label="host executor")
    share = np.stack([of(results, f"host_{rate}", "needed") for rate in RATES]).mean(axis=1)
    axes.plot(RATES, mean[0] * share, ":", color="C0", label="host, if time went with needed FLOPs")
    for arm, colour, label in (
        ("masked", "C1", "masked execution"),
        ("fused", "0.4", "one program, no exits"),
    ):
        axes.axhline(of(results, arm, "ms").mean(), color=colour, ls="--", lw=1, label=label)
    slow = of(results, "op_by_op", "times").mean()
    axes.set(xlabel="percent of images that leave at the first of six exits", ylim=(0, None),
             ylabel="CPU milliseconds an image, batch 1",
             title=f"operation by operation: {slow:.0f} times the host executor")  # fmt: skip
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    _save(figure, path)


def by_exit(shown: dict[str, Any], path: Path) -> None:
    """A row of images for every exit."""
    left = np.asarray(shown["left"])
    exits = int(left.max()) + 1
    figure, grid = plt.subplots(
        exits, PER_EXIT, figsize=(PER_EXIT * 0.66, exits * 0.72), squeeze=False
    )
    for index, row in enumerate(grid):
        mine = [n for n in shown["rows"] if left[n] == index]
        for axes in row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, n in zip(row, mine, strict=False):
            axes.imshow(np.asarray(shown["images"][str(n)]), cmap="gray_r")
        name = f"exit {index + 1}" if index < 5 else "end"
        row[0].set_ylabel(f"{name}\n{(left == index).sum()} of {len(left)}", rotation=0, ha="right",
                          va="center", fontsize=8)  # fmt: skip
    _save(figure, path)


def skipped(shown: dict[str, Any], path: Path) -> None:
    """Images, and which of the six gated blocks each ran."""
    ran = np.asarray(shown["opened"]) > 0
    blocks = np.delete(ran, (0, 4), axis=1)  # the stem and the step between levels always run
    figure, grid = plt.subplots(2, SHOWN, figsize=(SHOWN * 0.9, 2.7), height_ratios=(1, 1.2))
    for n in range(SHOWN):
        top, below = grid[:, n]
        top.imshow(np.asarray(shown["images"][str(n)]), cmap="gray_r")
        below.imshow(blocks[n][:, None], cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
        for axes in (top, below):
            axes.set(xticks=[], yticks=[])
        for row in range(1, blocks.shape[1]):
            below.axhline(row - 0.5, color="white", lw=2)
        top.spines[:].set_visible(False)
    grid[1, 0].set_yticks(range(6), [f"block {n + 1}" for n in range(6)], fontsize=7)
    figure.suptitle("dark: the block ran for this image", fontsize=9, x=0.13, ha="left")
    _save(figure, path)


def parts(results: dict[str, Any], path: Path) -> None:
    """Three pairs of bars: liveness, buckets, speculation."""
    pairs = (
        ("kb", "kilobytes across boundaries\nan image", "live", "everything", "liveness"),
        ("programs", "programs compiled\nin 25 batches", "buckets", "no_buckets", "buckets"),
        ("ms", "milliseconds an image,\n50 percent leave early", "ahead_50", "host_50", "speculation"),
    )  # fmt: skip
    figure, grid = plt.subplots(1, 3, figsize=(9.0, 2.8))
    for axes, (metric, label, on, off, what) in zip(grid, pairs, strict=True):
        for place, arm in enumerate((on, off)):
            values = of(results, arm, metric)
            axes.bar(place, values.mean(), color=("C0", "0.7")[place], width=0.6)
            axes.plot([place] * len(values), values, ".", color="0.2", ms=4)
        axes.set_xticks((0, 1), (f"{what} on", "off"))
        axes.set_ylabel(label, fontsize=8)
    figure.tight_layout()
    _save(figure, path)
