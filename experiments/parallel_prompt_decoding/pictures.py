"""The pictures of the page: accuracy by distance, bytes by tokens computed, what a pass costs, passes on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

LABELS = {"trained": "trained prompt tokens", "random": "random embeddings",
          "text": "embeddings of \"Nex\"", "heads": "heads (Medusa-style)"}  # fmt: skip
DISTANCES = (2, 3, 4)


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    accuracy(results, outdir / "1_accuracy_by_distance.svg")
    budgets(results, shown, outdir / "2_bytes_and_tokens_computed.svg")
    costs(shown, outdir / "3_time_of_a_pass.svg")
    drawing.shaded_text(
        shown[0]["text"],
        shown[0]["advance"],
        outdir / "4_passes_on_text.png",
        what="bytes that the pass of a byte wrote (0: the prompt)",
    )


def accuracy(results: dict[str, Any], path: Path) -> None:
    """Best guess and ten best guesses: mean and range over seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.4), sharey=True)
    for axes, metric, title in zip(
        panels, ("top1", "top10"), ("best guess", "ten best"), strict=True
    ):
        for index, (name, label) in enumerate(LABELS.items()):
            arms = [drawing.figures_of(results, f"{name}_{n}") for n in DISTANCES]
            values = [[one[metric] for one in arm] for arm in arms]
            mean = np.mean(values, axis=1)
            span = [mean - np.min(values, axis=1), np.max(values, axis=1) - mean]
            axes.errorbar(DISTANCES, mean, span, marker="o", ms=4, lw=1.2, capsize=2,
                          color=f"C{index}", label=label)  # fmt: skip
        axes.set(xlabel="bytes ahead", title=title, xticks=DISTANCES)
    panels[0].set_ylabel("share of bytes that are right")
    panels[0].legend(fontsize=7)
    drawing.save(figure, path)


def budgets(results: dict[str, Any], shown: list[dict[str, Any]], path: Path) -> None:
    """Bytes a pass against tokens a pass, by budget; and the other trees of trained prompts."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for index, (name, label) in enumerate(LABELS.items()):
        points = np.mean([one["curves"][name] for one in shown], axis=0)
        axes.plot(*points.T, "o-", ms=4, lw=1.2, color=f"C{index}", label=label)
    controls = {"random_tree": ("x", "random trees"), "static": ("s", "static tree")}
    for arm, (marker, label) in controls.items():
        found = drawing.figures_of(results, arm)
        mean = [np.mean([one[key] for one in found]) for key in ("computed", "tokens")]
        axes.plot(*mean, marker, color="C0", mfc="none", label=f"{label}, trained prompt tokens")
    axes.set(xlabel="tokens computed a pass", ylabel="bytes written a pass")
    axes.legend(fontsize=7)
    drawing.save(figure, path)


def costs(shown: list[dict[str, Any]], path: Path) -> None:
    """Time of a pass by budget, over that of a pass of one byte; every seed's line."""
    figure, axes = plt.subplots(figsize=(5.6, 3.4))
    for one in shown:
        ratio = np.asarray(one["latencies"]) / one["latencies"][0]
        axes.plot(one["budgets"], ratio, ".-", color="C3", lw=0.8, alpha=0.6)
    axes.plot([], [], ".-", color="C3", label="time of a pass")
    points = np.mean([one["curves"]["trained"] for one in shown], axis=0)
    axes.plot(shown[0]["budgets"], [1, *points[:, 1]], "o-", ms=4, color="C0", label="bytes a pass")
    axes.set(xlabel="budget: candidates and prompt tokens", ylabel="relative to greedy decoding")
    axes.legend(fontsize=7)
    drawing.save(figure, path)
