"""The pictures of the page: quality against networks, networks over training, by kind of token, load, real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

TAUS = {"tau_010": "τ = 0.1", "tau_025": "τ = 0.25", "tau_050": "τ = 0.5",
        "tau_075": "τ = 0.75", "tau_100": "τ = 1"}  # fmt: skip
LABELS = {
    "top_1": "top-1 of 8 networks", "top_2": "top-2 of 8 networks", **TAUS,
    "no_residual": "τ = 0.75, no gating residual", "no_constants": "τ = 0.75, no constants",
    "random_free": "random choice at τ = 0.75's frequencies",
}  # fmt: skip
FREE = ("constant", "constant", "copy", "zero")


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Five files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    drawing.plane(
        results,
        LABELS,
        outdir / "1_quality_against_networks.svg",
        x=("experts", "mean networks per token and layer"),
        y=("nats", "validation nats per byte"),
        line=("top_1", "top_2"),
        sweep=tuple(TAUS),
    )
    drawing.curves(shown, TAUS, outdir / "2_networks_over_training.svg", y="networks per token")
    drawing.classes_and_layers(
        shown, outdir / "3_networks_by_kind_of_token.svg", y="mean networks per token"
    )
    load(shown, outdir / "4_load.svg")
    drawing.shaded_text(
        shown[0]["text"],
        shown[0]["experts"],
        outdir / "5_networks_on_text.png",
        what="networks of each byte (mean over layers)",
    )


def load(shown: list[dict[str, Any]], path: Path) -> None:
    """Share of all choices that each expert gets at tau = 0.75, by layer; mean over seeds."""
    share = np.mean([one["load"] for one in shown], axis=0)
    networks = share.shape[1] - len(FREE)
    names = [*(f"network {index}" for index in range(networks)), *FREE]
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(share) + 1.6))
    image = axes.imshow(share, cmap="Oranges", vmin=0, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(share)), [str(layer) for layer in range(len(share))])
    axes.set(ylabel="layer", title="share of all choices (τ = 0.75)")
    figure.colorbar(image)
    drawing.save(figure, path)
