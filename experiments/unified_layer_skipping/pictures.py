"""The pictures of the page: loss against blocks, what tuning closes, decode time, and blocks on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

RULES = {
    "even": "evenly spaced", "pruned": "evenly spaced, prompt too", "bottom": "bottom",
    "top": "top (and layer 0)", "random": "random",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    quality(results, outdir / "1_loss_against_blocks.svg")
    speed(results, outdir / "2_decode_steps.svg")
    one = shown[0]
    for name, values, what in (
        ("3_blocks_on_text.png", one["depth"], "blocks that each byte runs (prompt, then response)"),
        ("4_what_skipping_costs.png", np.clip(one["cost"], 0, 2).tolist(),
         "nats that four of twelve blocks cost each response byte, tuned, cut at 0 and 2"),
    ):  # fmt: skip
        drawing.shaded_text(one["text"], values, outdir / name, what=what)


def quality(results: dict[str, Any], path: Path) -> None:
    """Loss against blocks before and after tuning: mean and range over seeds."""
    figure, grid = plt.subplots(1, 2, figsize=(9.6, 3.8), sharey=False)
    for axes, prefix, whole in zip(grid, ("untuned_", ""), ("base", "full"), strict=True):
        for index, (rule, label) in enumerate(RULES.items()):
            arms = [f"{prefix}{rule}_{s}" for s in ((2, 3, 6) if rule == "even" else (2, 3))]
            values = [[f["nats"] for f in drawing.figures_of(results, arm)] for arm in arms]
            blocks = [drawing.figures_of(results, arm)[0]["blocks"] for arm in arms]
            mean = np.mean(values, axis=1)
            span = [mean - np.min(values, axis=1), np.max(values, axis=1) - mean]
            axes.errorbar(blocks, mean, span, marker="o", ms=4, lw=1.2, capsize=2,
                          color=f"C{index}", label=label)  # fmt: skip
        nats = np.mean([f["nats"] for f in drawing.figures_of(results, whole)])
        axes.axhline(nats, color="0.5", ls="--", lw=1, label="full depth")
        axes.set(xlabel="blocks a response token, of 12", ylabel="response nats per byte")
        axes.set_title("as trained at full depth" if prefix else "tuned for its layers", fontsize=9)
        axes.legend(fontsize=7)
    drawing.save(figure, path)


def speed(results: dict[str, Any], path: Path) -> None:
    """Measured time of a decode step against its FLOPs, both over full depth's."""
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    for metric, label in (("step_ms", "batch 1"), ("step_ms_8", "batch 8")):
        points = []
        for arm in ("full", "even_2", "even_3", "even_6"):
            own, whole = (drawing.figures_of(results, name) for name in (arm, "full"))
            ratio = [a[metric] / b[metric] for a, b in zip(own, whole, strict=True)]
            points.append((own[0]["flops"], np.mean(ratio)))
        axes.plot(*np.asarray(points).T, "o-", label=label)
    axes.plot([0, 1], [0, 1], color="0.7", lw=1, label="as the FLOPs")
    axes.set(xlabel="decode FLOPs over full depth's", ylabel="time of a step over full depth's")
    axes.legend(fontsize=8)
    drawing.save(figure, path)
