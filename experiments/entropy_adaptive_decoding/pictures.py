"""The pictures of the page: loss against share, and who runs where on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

SHARES = ("75", "62", "50", "25")
KINDS = {"entropy": "by entropy", "random": "same runs, random order", "periodic": "periodic",
         "oracle": "oracle (sees the gap)"}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    shares(results, outdir / "1_loss_against_share.svg")
    one = shown[0]
    drawing.shaded_text(
        one["text"], one["large"], outdir / "2_who_runs.png", what="1: the large model runs"
    )
    drawing.shaded_text(
        one["text"],
        one["entropy"],
        outdir / "3_entropy.png",
        what="entropy of the small model, bits",
    )


def shares(results: dict[str, Any], path: Path) -> None:
    """Mean over seeds of every kind of choice."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    mean = lambda arm, key: np.mean([f[key] for f in drawing.figures_of(results, arm)])
    ends = [(mean(arm, "large_share"), mean(arm, "nats")) for arm in ("small", "large")]
    axes.plot(*zip(*ends, strict=True), "k--", lw=1, label="straight line")
    for kind, label in KINDS.items():
        arms = [f"{kind}_{share}" for share in SHARES]
        points = [(mean(arm, "large_share"), mean(arm, "nats")) for arm in arms]
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(xlabel="share of steps by the large model", ylabel="validation nats per byte")
    axes.legend()
    drawing.save(figure, path)
