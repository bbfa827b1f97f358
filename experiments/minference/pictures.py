"""The pictures of the page: which pattern each head has, what one head of each reads, and loss against density."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

LABELS = {
    "dense": "dense", "searched": "searched, each head its own", "a_shape": "A-shape", "lines": "vertical-slash",
    "blocks": "best blocks", "random": "random blocks",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")][0]
    table(shown, outdir / "1_pattern_of_each_head.svg")
    heads(shown, outdir / "2_what_heads_read.png")
    losses(results, outdir / "3_loss.svg")


def table(shown: dict[str, Any], path: Path) -> None:
    """Layers by heads."""
    found, names = np.asarray(shown["table"]), shown["names"]
    figure, axes = plt.subplots(figsize=(9, 3.2))
    colours = plt.get_cmap("tab10")
    axes.imshow(found.T, cmap=colours, vmin=0, vmax=9, aspect="auto")
    for n, name in enumerate(names):
        axes.plot([], [], "s", color=colours(n), label=f"{name} ({int((found == n).sum())})")
    axes.set(xlabel="layer", ylabel="head", title="pattern of each head")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=3, fontsize=8)
    drawing.save(figure, path)


def heads(shown: dict[str, Any], path: Path) -> None:
    """One head of each kind: what its queries (downwards) compute of the keys."""
    t, tile, kinds = shown["tokens"], shown["tile"], sorted(shown["heads"])
    figure, all_axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4.2), squeeze=False)
    for axes, kind in zip(all_axes[0], kinds, strict=True):
        own, seen = shown["heads"][kind], np.zeros((t, t), bool)
        for x, begins in enumerate(own["spans"]):
            for begin in begins:
                seen[x * tile : (x + 1) * tile, begin : begin + tile] = True
        seen[:, own["columns"]] = True
        step = max(t // 700, 1)  # a dot is dark where any of its pairs is read: single columns stay
        dots = np.tril(seen)[: t // step * step, : t // step * step]
        dots = dots.reshape(t // step, step, t // step, step).any(axis=(1, 3))
        axes.imshow(dots, cmap="Greys", interpolation="nearest")
        axes.set(title=f"{kind}: layer {own['layer']}, head {own['head']}", xticks=[], yticks=[])
    drawing.save(figure, path)


def losses(results: dict[str, Any], path: Path) -> None:
    """Loss on text and on a hidden key, every seed as a dot."""
    figure, all_axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, metric, title in zip(
        all_axes,
        ("text_2k", "key_2k"),
        ("text, nats a token", "hidden key, nats a token"),
        strict=True,
    ):
        found = [[f[metric] for f in drawing.figures_of(results, arm)] for arm in LABELS]
        drawing.bars(axes, list(LABELS.values()), np.asarray(found).T.tolist())
        axes.set(title=title)
        axes.tick_params(axis="x", rotation=40)
        plt.setp(axes.get_xticklabels(), ha="right", fontsize=8)
    drawing.save(figure, path)
