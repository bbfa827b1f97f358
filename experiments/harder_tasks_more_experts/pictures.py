"""The pictures of the page: quality against experts, experts over training, by kind of token, and on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

LABELS = {
    "top_1": "top-1", "top_2": "top-2", "random_k": "random, top-p's counts",
    "top_p": "top-p (β = 1e-4)", "top_p_beta_0": "top-p (β = 0)",
    "top_p_beta_1e-3": "top-p (β = 1e-3)", "top_p_beta_1e-2": "top-p (β = 1e-2)",
}  # fmt: skip
WIDTH = 96
"""Characters a line of the text picture."""


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    quality(results, outdir / "1_quality_against_experts.svg")
    training(shown, outdir / "2_experts_over_training.svg")
    classes(shown, outdir / "3_experts_by_kind_of_token.svg")
    text(shown[0], outdir / "4_experts_on_text.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)


def quality(results: dict[str, Any], path: Path) -> None:
    """Every arm's seeds and mean in the plane of active experts and nats; the line from top-1 to top-2."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    means = {}
    for index, (arm, label) in enumerate(LABELS.items()):
        pairs = [(f["experts"], f["nats"]) for f in figures_of(results, arm)]
        x, y = np.asarray(pairs).T
        means[arm] = (x.mean(), y.mean())
        axes.plot(x, y, ".", color=f"C{index}", alpha=0.4)
        axes.plot(x.mean(), y.mean(), "o", color=f"C{index}", label=label)
    axes.plot(*zip(means["top_1"], means["top_2"], strict=True), "-", color="0.6", lw=1, zorder=0)
    axes.set(xlabel="mean active experts per token and layer", ylabel="validation nats per byte")
    axes.legend(fontsize=8)
    _save(figure, path)


def figures_of(results: dict[str, Any], arm: str) -> list[dict[str, float]]:
    """An arm's figures, one dict a seed."""
    return [run["arms"][arm]["figures"] for run in results["runs"]]


def training(shown: list[dict[str, Any]], path: Path) -> None:
    """Mean over seeds of the active experts while training."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for index, (arm, label) in enumerate(LABELS.items()):
        curves = [np.asarray(one["curves"][arm]) for one in shown if arm in one["curves"]]
        if curves:
            steps, values = np.mean(curves, axis=0).T
            axes.plot(steps, values, color=f"C{index}", label=label)
    axes.set(xlabel="step", ylabel="active experts")
    axes.legend(fontsize=8)
    _save(figure, path)


def classes(shown: list[dict[str, Any]], path: Path) -> None:
    """Mean active experts of each kind of byte, with every seed as a dot; and of each layer."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), width_ratios=(7, 3))
    names = sorted(shown[0]["classes"], key=lambda name: -shown[0]["classes"][name])
    _bars(left, names, [[one["classes"].get(name, np.nan) for name in names] for one in shown])
    layers = [str(index) for index in range(len(shown[0]["layers"]))]
    _bars(right, layers, [one["layers"] for one in shown])
    left.set(ylabel="mean active experts", title="by kind of token")
    right.set(xlabel="layer", title="by layer")
    left.tick_params(axis="x", rotation=30)
    _save(figure, path)


def _bars(axes: Any, names: list[str], seeds: list[list[float]]) -> None:
    values = np.asarray(seeds)
    axes.bar(names, np.nanmean(values, axis=0), color="C0", alpha=0.6)
    for row in values:
        axes.plot(names, row, ".", color="0.25", ms=4)


def text(one: dict[str, Any], path: Path) -> None:
    """Validation text, each byte shaded by its active experts (mean over layers)."""
    lines, column, row = [], 0, 0
    for value, experts in zip(one["text"], one["experts"], strict=True):
        if column == WIDTH:
            column, row = 0, row + 1
        lines.append((column, row, chr(value), experts))
        column += 1
        if value == 10:
            column, row = 0, row + 1
    figure, axes = plt.subplots(figsize=(WIDTH * 0.095, (row + 1) * 0.19 + 0.6))
    shades = plt.get_cmap("Oranges")
    low, high = min(one["experts"]), max(one["experts"])
    for column, row_, letter, experts in lines:
        share = 0.8 * (experts - low) / ((high - low) or 1.0)
        axes.add_patch(plt.Rectangle((column, row_), 1, 1, color=shades(share), lw=0))
        if letter.isprintable() and letter != " ":
            axes.text(column + 0.5, row_ + 0.55, letter, ha="center", va="center", fontsize=7,
                      family="monospace", parse_math=False)  # fmt: skip
    axes.set(xlim=(0, WIDTH), ylim=(row + 1, 0))
    axes.set_title(f"active experts of each byte: {low:.2f} (white) to {high:.2f}", fontsize=9)
    axes.axis("off")
    _save(figure, path)
