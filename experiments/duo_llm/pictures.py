"""The pictures of the page: loss against budget, where oracles put big modules, learned choices on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

BUDGETS = (1, 2, 3, 4, 5)
CURVES = {
    "mean": "mean fixed route", "best": "best fixed route (chosen on half A)",
    "seq": "sequence oracle", "tok": "token oracle",
}  # fmt: skip
POINTS = {
    "all_small": "all small", "all_big": "all big", "dense": "dense, trained alone",
    "token_random": "random per token", "learned_025": "learned, budget 1/4",
    "learned_050": "learned, budget 1/2", "shuffled_025": "its choices shuffled (1/4)",
    "shuffled_050": "its choices shuffled (1/2)",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    budget(results, outdir / "1_loss_against_budget.svg")
    heat(shown, outdir / "2_where_oracles_put_big_modules.svg")
    learned = [one["text_050"] for one in shown]
    drawing.classes_and_layers(
        [{**one, "layers": one["layers"]} for one in learned],
        outdir / "3_learned_choices.svg",
        y="big modules a token / share",
    )
    drawing.shaded_text(
        learned[0]["text"],
        learned[0]["big"],
        outdir / "4_learned_choices_on_text.png",
        what="big modules of each byte, of 6 layers",
    )


def budget(results: dict[str, Any], path: Path) -> None:
    """Mean over seeds of every curve and point; the token oracle, far below, in a panel of its own."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(7, 3))
    mean = lambda arm, key: np.mean([f[key] for f in drawing.figures_of(results, arm)])
    for index, (kind, label) in enumerate(CURVES.items()):
        axes = right if kind == "tok" else left
        values = [mean(f"{kind}_b{b}", "nats") for b in BUDGETS]
        axes.plot(BUDGETS, values, "o-", color=f"C{index}", label=label)
    for index, (arm, label) in enumerate(POINTS.items()):
        left.plot(mean(arm, "big"), mean(arm, "nats"), "sDvP^*x+"[index], color="0.3", label=label)
    right.axhline(mean("all_big", "nats"), color="0.6", lw=1, label="all big")
    for axes in (left, right):
        axes.set(xlabel="big modules per token, of 6 layers")
        axes.legend(fontsize=7)
    left.set(ylabel="validation nats per byte (half B)")
    drawing.save(figure, path)


def heat(shown: list[dict[str, Any]], path: Path) -> None:
    """Share of sequences whose oracle route has a big module in each layer, for each budget."""
    share = np.mean([one["heat"] for one in shown], axis=0)
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    image = axes.imshow(share, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
    axes.set(
        xlabel="layer",
        ylabel="big modules allowed",
        title="sequence oracle: share with a big module",
    )
    axes.set_yticks(range(len(BUDGETS)), [str(b) for b in BUDGETS])
    for (row, column), value in np.ndenumerate(share):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image)
    drawing.save(figure, path)
