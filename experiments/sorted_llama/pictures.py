"""The pictures of the page: loss at every exit, dynamic inference against random exits, exits on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

DEPTHS = (3, 6, 9, 12)
CURVES = {
    "sorted": "sorted (mean over exits)", "sampled": "sorted (one exit a step)",
    "unnormed": "sorted, no norm at early exits", "last": "plain fine-tuning",
    "own_heads": "plain, then a head for each exit", "base": "before tuning",
}  # fmt: skip
SETTINGS = ("6", "9", "published")


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Three files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    exits(results, outdir / "1_loss_at_every_exit.svg")
    dynamic(results, outdir / "2_confident_and_random_exits.svg")
    drawing.shaded_text(
        shown[0]["text"],
        shown[0]["blocks"],
        outdir / "3_exits_on_text.png",
        what="blocks after which the next byte is predicted, 6 on average",
    )


def exits(results: dict[str, Any], path: Path) -> None:
    """Loss against blocks: mean and range over seeds."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for index, (name, label) in enumerate(CURVES.items()):
        values = [[f["nats"] for f in drawing.figures_of(results, f"{name}_{n}")] for n in DEPTHS]
        mean = np.mean(values, axis=1)
        span = [mean - np.min(values, axis=1), np.max(values, axis=1) - mean]
        axes.errorbar(DEPTHS, mean, span, marker="o", ms=4, lw=1.2, capsize=2, color=f"C{index}",
                      label=label)  # fmt: skip
    for n in (3, 6):
        nats = np.mean([f["nats"] for f in drawing.figures_of(results, f"extracted_{n}")])
        axes.plot(n, nats, "kx", label="cut out and tuned alone" if n == 3 else None)
    low = min(f["nats"] for n in DEPTHS for f in drawing.figures_of(results, f"sorted_{n}"))
    axes.set(xlabel="blocks run, of 12", ylabel="validation nats per byte", xticks=DEPTHS)
    axes.set_ylim(low - 0.05, low + 1.2)
    axes.legend(fontsize=7)
    drawing.save(figure, path)


def dynamic(results: dict[str, Any], path: Path) -> None:
    """Loss against mean blocks: confident and random exits of the sorted network, and its fixed exits."""
    figure, axes = plt.subplots(figsize=(6.0, 3.8))
    mean = lambda arm, key: np.mean([f[key] for f in drawing.figures_of(results, arm)])
    kinds = {
        "confident exits": [f"confident_{s}" for s in SETTINGS],
        "random exits, same histogram": [f"random_{s}" for s in SETTINGS],
        "one exit for all": [f"sorted_{n}" for n in DEPTHS],
        "confident exits, plain fine-tuning": ["last_confident_6", "last_confident_9"],
    }
    for index, (label, arms) in enumerate(kinds.items()):
        points = sorted((mean(arm, "blocks"), mean(arm, "nats")) for arm in arms)
        axes.plot(*np.asarray(points).T, "o-", ms=4, lw=1.2, color=f"C{index}", label=label)
    axes.set(xlabel="mean blocks a byte, of 12", ylabel="validation nats per byte")
    axes.legend(fontsize=7)
    drawing.save(figure, path)
