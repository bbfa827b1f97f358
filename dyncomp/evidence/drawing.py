"""Pictures that the pages of several experiments share; each writes one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

WIDTH = 96
"""Characters a line of a text picture."""


def save(figure: Any, path: Path) -> None:
    """Writes and closes a figure."""
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)


def figures_of(results: Mapping[str, Any], arm: str) -> list[dict[str, float]]:
    """An arm's figures, one dict a seed."""
    return [run["arms"][arm]["figures"] for run in results["runs"]]


CROWD = 8
"""Arms whose legend would hide the points."""


def plane(
    results: Mapping[str, Any],
    labels: Mapping[str, str],
    path: Path,
    *,
    x: tuple[str, str],
    y: tuple[str, str],
    line: tuple[str, str] | None = None,
    sweep: Sequence[str] = (),
) -> None:
    """Every arm's seeds and mean in a plane of compute and quality.

    Args:
      results: the experiment's results.
      labels: arm -> what the legend calls it, in order.
      x, y: (metric, axis label).
      line: two arms joined by a straight line.
      sweep: arms joined in order, the settings of one method.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    means = {}
    for index, (arm, label) in enumerate(labels.items()):
        pairs = np.asarray([(f[x[0]], f[y[0]]) for f in figures_of(results, arm)])
        means[arm] = pairs.mean(axis=0)
        axes.plot(*pairs.T, ".", color=f"C{index}", alpha=0.4)
        axes.plot(*means[arm], "os^v"[index // 10 % 4], color=f"C{index}", label=label)
    for joined, style in ((line or (), "-"), (sweep, ":")):
        if joined:
            points = np.asarray([means[arm] for arm in joined]).T
            axes.plot(*points, style, color="0.6", lw=1, zorder=0)
    axes.set(xlabel=x[1], ylabel=y[1])
    if len(labels) > CROWD:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    else:
        axes.legend(fontsize=8)
    save(figure, path)


def curves(
    shown: Sequence[Mapping[str, Any]], labels: Mapping[str, str], path: Path, *, y: str
) -> None:
    """Mean over seeds of ``shown[seed]["curves"][arm]``, pairs of step and value."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for index, (arm, label) in enumerate(labels.items()):
        found = [np.asarray(one["curves"][arm]) for one in shown if arm in one["curves"]]
        if found:
            steps, values = np.mean(found, axis=0).T
            axes.plot(steps, values, color=f"C{index}", label=label)
    axes.set(xlabel="step", ylabel=y)
    axes.legend(fontsize=8)
    save(figure, path)


def classes_and_layers(shown: Sequence[Mapping[str, Any]], path: Path, *, y: str) -> None:
    """Bars of ``classes`` (name -> value) and of ``layers`` (values), with every seed as a dot."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), width_ratios=(7, 3))
    names = sorted(shown[0]["classes"], key=lambda name: -shown[0]["classes"][name])
    bars(left, names, [[one["classes"].get(name, np.nan) for name in names] for one in shown])
    layers = [str(index) for index in range(len(shown[0]["layers"]))]
    bars(right, layers, [one["layers"] for one in shown])
    left.set(ylabel=y, title="by kind of token")
    right.set(xlabel="layer", title="by layer")
    left.tick_params(axis="x", rotation=30)
    save(figure, path)


def bars(axes: Any, names: Sequence[str], seeds: Sequence[Sequence[float]]) -> None:
    """The mean over seeds as bars, every seed as a dot."""
    values = np.asarray(seeds)
    axes.bar(names, np.nanmean(values, axis=0), color="C0", alpha=0.6)
    for row in values:
        axes.plot(names, row, ".", color="0.25", ms=4)


def shaded_text(values: Sequence[int], shades: Sequence[float], path: Path, *, what: str) -> None:
    """Text, each byte shaded by a number.

    Args:
      values: bytes.
      shades: one number a byte.
      what: what the numbers are, for the title.
    """
    places, column, row = [], 0, 0
    for value, shade in zip(values, shades, strict=True):
        if column == WIDTH:
            column, row = 0, row + 1
        places.append((column, row, chr(value), shade))
        column += 1
        if value == 10:
            column, row = 0, row + 1
    figure, axes = plt.subplots(figsize=(WIDTH * 0.095, (row + 1) * 0.19 + 0.6))
    colours = plt.get_cmap("Oranges")
    low, high = min(shades), max(shades)
    for column, row_, letter, shade in places:
        share = 0.8 * (shade - low) / ((high - low) or 1.0)
        axes.add_patch(plt.Rectangle((column, row_), 1, 1, color=colours(share), lw=0))
        if letter.isprintable() and letter != " ":
            axes.text(column + 0.5, row_ + 0.55, letter, ha="center", va="center", fontsize=7,
                      family="monospace", parse_math=False)  # fmt: skip
    axes.set(xlim=(0, WIDTH), ylim=(row + 1, 0))
    axes.set_title(f"{what}: {low:.2f} (white) to {high:.2f}", fontsize=9)
    axes.axis("off")
    save(figure, path)
