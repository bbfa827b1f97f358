"""The pictures of the page: loss by budget, the pass key, and what a query selected on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

BUDGETS = (32, 96, 224)
LINES = {"soft": "votes", "recent": "newest", "random": "random"}
ASKED = ("dense", "soft", "scaled", "raw", "modulo", "recent", "random")


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    mean = lambda arm, key: np.mean([f[key] for f in drawing.figures_of(results, arm)])
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for vote, label in LINES.items():
        points = [(mean(f"{vote}_{n}", "read"), mean(f"{vote}_{n}", "followed")) for n in BUDGETS]
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.axhline(mean("dense", "followed"), color="k", ls="--", lw=1, label="all tokens")
    axes.set(xlabel="tokens that a query reads", ylabel="nats a token")
    axes.legend()
    drawing.save(figure, outdir / "1_loss_by_budget.svg")
    figure, axes = plt.subplots(figsize=(6.5, 3))
    names = [name if name == "dense" else f"{name}_asked" for name in ASKED]
    axes.bar(ASKED, [mean(name, "key") for name in names])
    axes.set(ylabel="nats a token of the pass key")
    drawing.save(figure, outdir / "2_pass_key.svg")
    shown = next(run["shown"] for run in results["runs"] if run.get("shown"))
    drawing.shaded_text(
        shown["text"][-2200:],
        shown["selected"][-2200:],
        outdir / "3_selected.png",
        what="share of layers whose last query selected the token (176 read)",
    )
