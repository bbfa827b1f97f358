"""The pictures of the page: bits against alpha, which alphas are chosen, and where, on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.decoding import alpha_grid
from dyncomp.evidence import drawing

NAMES = {"code": "Python code without documentation", "headers": "C headers"}
LINES = {"large": "large model alone", "expert": "expert alone", "dynamic": "fused, alpha chosen at each byte",
         "bound": "large model, fine-tuned"}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    alphas(results, shown, outdir / "1_bits_against_alpha.svg")
    chosen(shown, outdir / "2_chosen_alphas.svg")
    one = shown[0]["code"]
    drawing.shaded_text(
        one["text"],
        one["alpha"],
        outdir / "3_alphas_on_text.png",
        what="alpha chosen for each byte",
    )


def alphas(results: dict[str, Any], shown: list[dict[str, Any]], path: Path) -> None:
    """Mean over seeds of fixed alphas as a curve, the others as lines."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    for axes, (domain, name) in zip(panels, NAMES.items(), strict=True):
        curve = np.mean([one[domain]["curve"] for one in shown], axis=0)
        axes.plot(alpha_grid(), curve, "k.-", label="fixed alpha")
        for index, (kind, label) in enumerate(LINES.items()):
            values = [f["bits"] for f in drawing.figures_of(results, f"{kind}_{domain}")]
            axes.axhline(np.mean(values), color=f"C{index}", label=label)
        axes.set(xlabel="alpha", title=name)
    panels[0].set(ylabel="validation bits per byte")
    panels[0].legend(fontsize=8)
    drawing.save(figure, path)


def chosen(shown: list[dict[str, Any]], path: Path) -> None:
    """How often each alpha is chosen, mean over seeds."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for domain, name in NAMES.items():
        share = np.mean([one[domain]["histogram"] for one in shown], axis=0)
        axes.plot(alpha_grid(), share, "o-", label=name)
    axes.set(xlabel="alpha", ylabel="share of positions")
    axes.legend(loc="upper left")
    drawing.save(figure, path)
