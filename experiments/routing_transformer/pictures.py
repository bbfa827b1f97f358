"""The pictures of the page: recall over training and against pairs, clusters of real code, clusters by kind of byte."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing
from dyncomp.tasks import CLASSES

LABELS = {
    "routed": "local + routing, causal", "best": "local + routing, published (leaks)",
    "random": "local + random", "hash": "local + random projections", "local": "local alone",
    "dense": "dense", "no_commitment": "routing, no commitment loss",
    "no_balance": "routing, no balance", "clusters_4": "routing, 4 clusters of 128",
    "clusters_16": "routing, 16 clusters of 32",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    drawing.plane(
        results,
        LABELS,
        outdir / "1_recall_against_pairs.svg",
        x=("executed", "pairs computed (mean over tokens, layers, heads)"),
        y=("accuracy", "accuracy of recalled values"),
    )
    drawing.curves(shown, LABELS, outdir / "2_recall_over_training.svg", y="nats per answer")
    code(shown[0]["text"], shown[0]["clusters"], outdir / "3_clusters_on_code.png")
    kinds(shown[0]["share"], outdir / "4_clusters_by_kind_of_byte.svg")


def code(values: list[int], clusters: list[list[int]], path: Path) -> None:
    """A piece of code, once for each routing head of the last layer; bytes of one colour share a cluster."""
    places, column, row = [], 0, 0
    for value in values:
        if column == drawing.WIDTH:
            column, row = 0, row + 1
        places.append((column, row))
        column += 1
        if value == 10:
            column, row = 0, row + 1
    size = (drawing.WIDTH * 0.095, len(clusters) * ((row + 1) * 0.19 + 0.4))
    figure, panels = plt.subplots(len(clusters), 1, figsize=size, squeeze=False)
    colours = plt.get_cmap("tab20")
    for head, axes in enumerate(panels[:, 0]):
        for (x, y), value, cluster in zip(places, values, clusters[head], strict=True):
            shade = (*colours(2 * (cluster % 10) + 1)[:3], 0.8)
            axes.add_patch(plt.Rectangle((x, y), 1, 1, color=shade, lw=0))
            letter = chr(value)
            if letter.isprintable() and letter != " ":
                axes.text(x + 0.5, y + 0.55, letter, ha="center", va="center", fontsize=7,
                          family="monospace", parse_math=False)  # fmt: skip
        axes.set(xlim=(0, drawing.WIDTH), ylim=(row + 1, 0))
        axes.set_title(f"head {head}: bytes of one colour share a cluster", fontsize=9)
        axes.axis("off")
    drawing.save(figure, path)


def kinds(share: list[list[list[int]]], path: Path) -> None:
    """Where bytes of each kind go: rows sum to 1."""
    figure, panels = plt.subplots(
        1, len(share), figsize=(4.4 * len(share), 3.2), squeeze=False, sharey=True
    )
    for head, axes in enumerate(panels[0]):
        counts = np.asarray(share[head], float)
        axes.imshow(
            counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), cmap="Oranges", vmin=0
        )
        axes.set_yticks(range(len(CLASSES)), CLASSES, fontsize=8)
        axes.set(xlabel="cluster", title=f"head {head}")
    drawing.save(figure, path)
