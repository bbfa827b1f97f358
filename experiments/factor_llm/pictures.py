"""The pictures of the page: loss against FFN FLOPs, reconstruction, slices by kind of token and layer, real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing
from dyncomp.tasks.token_classes import CLASSES

BEFORE = {
    "random": "random slices", "frozen": "random linear router", "fitted": "fitted router",
    "label": "label (sees the outputs)", "subset": "best subset (sees the outputs)",
}  # fmt: skip
TUNED = {
    "random": "random slices", "frozen": "random linear router, frozen",
    "unguided": "language-model loss alone", "imitation": "with the imitation loss",
}  # fmt: skip
COLORS = {"random": "C0", "frozen": "C1", "fitted": "C2", "label": "C3", "subset": "C4",
          "unguided": "C5", "imitation": "C2"}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    quality(results, outdir / "1_loss_against_ffn_flops.svg")
    reconstruction(results, outdir / "2_reconstruction.svg")
    classes(shown[0], outdir / "3_slices_by_kind_of_token.svg")
    layer = len(shown[0]["slices"]) // 2
    text(shown[0], layer, outdir / "4_slices_on_text.png")


def line(axes: Any, results: dict[str, Any], arms: list[str], metric: str, **style: Any) -> None:
    """Mean and range over seeds of arms that are settings of one method."""
    found = [drawing.figures_of(results, arm) for arm in arms]
    x = [np.mean([f["ffn_share"] for f in one]) for one in found]
    values = np.asarray([[f[metric] for f in one] for one in found])
    mean = values.mean(axis=1)
    span = [mean - values.min(axis=1), values.max(axis=1) - mean]
    axes.errorbar(x, mean, span, marker="o", ms=4, lw=1.2, capsize=2, **style)


def quality(results: dict[str, Any], path: Path) -> None:
    """Loss against the share of FFN FLOPs, before and after fine-tuning; the dense network as a line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0))
    for router, label in BEFORE.items():
        arms = [f"{router}_{k}" for k in (1, 2, 3)]
        line(left, results, arms, "nats", color=COLORS[router], label=label)
    for arm, label in TUNED.items():
        arms = [f"tuned_{arm}_{k}" for k in (1, 2)]
        line(right, results, arms, "nats", color=COLORS[arm], label=label)
    for axes, arm in ((left, "dense"), (right, "dense_longer")):
        nats = np.mean([f["nats"] for f in drawing.figures_of(results, arm)])
        axes.axhline(nats, color="0.5", ls="--", lw=1, label="dense" + " as long" * (axes is right))
        axes.set(xlabel="FFN FLOPs over the dense network's", ylabel="validation nats per byte")
        axes.legend(fontsize=7)
    left.set_title("as cut", fontsize=9)
    right.set_title("slices trained on for 5% of the steps", fontsize=9)
    drawing.save(figure, path)


def reconstruction(results: dict[str, Any], path: Path) -> None:
    """Relative squared error on the dense network's states against K."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for router, label in BEFORE.items():
        arms = [f"{router}_{k}" for k in (1, 2, 3)]
        line(axes, results, arms, "reconstruction", color=COLORS[router], label=label)
    axes.set(xlabel="FFN FLOPs over the dense network's", ylabel="relative squared error")
    axes.legend(fontsize=7)
    drawing.save(figure, path)


def classes(one: dict[str, Any], path: Path) -> None:
    """Share of each kind of byte that each slice gets, layer by layer, one slice a token."""
    tables = np.asarray(one["classes"], float)
    seen = tables.sum(axis=(0, 2)) > 0
    figure, grid = plt.subplots(
        1, len(tables), figsize=(1.2 + 2.3 * len(tables), 3.0), squeeze=False
    )
    for layer, (axes, table) in enumerate(zip(grid[0], tables, strict=True)):
        share = table[seen] / table[seen].sum(axis=1, keepdims=True)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(share):
            shade = "white" if value > 0.6 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade
            )
        names = np.asarray(CLASSES)[seen] if layer == 0 else []
        axes.set(xticks=range(table.shape[1]), xlabel="slice", title=f"layer {layer}")
        axes.set_yticks(range(len(names)), names)
    drawing.save(figure, path)


def text(one: dict[str, Any], layer: int, path: Path) -> None:
    """Validation text, each byte in the colour of its slice in a middle layer."""
    figure, axes = plt.subplots(figsize=(drawing.WIDTH * 0.095, 3.6))
    column, row = 0, 0
    for value, index in zip(one["text"], one["slices"][layer], strict=True):
        if column == drawing.WIDTH:
            column, row = 0, row + 1
        box = plt.Rectangle((column, row), 1, 1, color=f"C{index}", alpha=0.45, lw=0)
        axes.add_patch(box)
        if chr(value).isprintable() and value != 32:
            axes.text(column + 0.5, row + 0.55, chr(value), ha="center", va="center", fontsize=7,
                      family="monospace", parse_math=False)  # fmt: skip
        column += 1
        if value == 10:
            column, row = 0, row + 1
    figure.set_size_inches(drawing.WIDTH * 0.095, (row + 1) * 0.19 + 0.6)
    axes.set(xlim=(0, drawing.WIDTH), ylim=(row + 1, 0))
    axes.set_title(f"slice of each byte in layer {layer} (a colour a slice)", fontsize=9)
    axes.axis("off")
    drawing.save(figure, path)
