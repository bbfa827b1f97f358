"""The pictures of the page: accuracy against keys, training, and what regions read on real images."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

TILES = {
    "routed": "routed, 4 of 16 regions", "top_1": "routed, 1", "top_2": "routed, 2", "top_8": "routed, 8",
    "dense": "dense", "local": "local window, 4", "random": "random, 4", "soft": "soft routing, 4",
}  # fmt: skip
CURVES = {arm: TILES[arm] for arm in ("routed", "dense", "local", "random", "soft")}
MARK = "white"


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    drawing.plane(
        results, TILES, outdir / "1_blank_tiles_against_attention.svg",
        x=("attention", "kFLOPs of pairs and of routing, an image"),
        y=("blank", "patches of blank tiles named rightly, percent"),
    )  # fmt: skip
    drawing.curves(shown, CURVES, outdir / "2_training.svg", y="training loss, nats a patch")
    rows = {arm: shown[0][arm] for arm in ("routed", "local", "random")}
    on_tiles(rows, outdir / "3_routes_on_tiles.png")
    on_garments(shown[0]["garments_routed"], outdir / "4_routes_on_garments.png")


def box(axes: Any, region: int, side: int, size: float, **style: Any) -> None:
    """Outlines a region."""
    row, column = divmod(region, side)
    pad = 1.0 if "ls" not in style else 2.5
    corner = (column * size - 0.5 + pad, row * size - 0.5 + pad)
    axes.add_patch(
        plt.Rectangle(corner, size - 2 * pad, size - 2 * pad, fill=False, lw=1.6, **style)
    )


def on_tiles(rows: dict[str, Any], path: Path, queries: int = 4) -> None:
    """One image for every query region: dashes around it, lines around what it reads in the last block."""
    image = np.asarray(rows["routed"]["images"][0], np.uint8)
    side = int(len(rows["routed"]["index"][0]) ** 0.5)
    size = len(image) / side
    grey = image.mean(axis=-1).reshape(side, int(size), side, int(size)).std(axis=(1, 3))
    blank = np.flatnonzero(grey.ravel() < 1.0)[:queries]
    figure, grid = plt.subplots(
        len(rows), len(blank), figsize=(2.0 * len(blank), 2.1 * len(rows)), squeeze=False
    )
    for line, (arm, one) in zip(grid, rows.items(), strict=True):
        for axes, query in zip(line, blank, strict=True):
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            for region in one["index"][0][query]:
                box(axes, region, side, size, color=MARK)
            box(axes, query, side, size, color=MARK, ls="--")
        line[0].set_ylabel(arm)
    figure.suptitle(
        "a blank tile (dashes) and the regions it reads in the last block (lines)", fontsize=9
    )
    drawing.save(figure, path)


def on_garments(one: dict[str, Any], path: Path) -> None:
    """A row for every garment: three query regions in the garment and one in the background."""
    images = np.asarray(one["images"], np.uint8)[..., 0]
    side = int(len(one["index"][0]) ** 0.5)
    size = images.shape[1] / side
    queries = [side * (side // 2) + side // 2, side + side // 2, side * (side - 2) + 2, 0]
    figure, grid = plt.subplots(
        len(images), len(queries), figsize=(2.0 * len(queries), 2.05 * len(images)), squeeze=False
    )
    for line, image, index in zip(grid, images, one["index"], strict=True):
        for axes, query in zip(line, queries, strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            for region in index[query]:
                box(axes, region, side, size, color="tab:orange")
            box(axes, query, side, size, color="tab:blue", ls="--")
    figure.suptitle("a region (blue dashes) and the regions it reads (orange)", fontsize=9)
    drawing.save(figure, path)
