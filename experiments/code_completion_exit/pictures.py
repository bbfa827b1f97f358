"""The pictures of the page: heads, exits and stops over thresholds, decisions on real text."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing

DEPTHS = tuple(range(1, 13))


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    exits(results, shown, outdir / "1_exits.svg")
    stops(shown, outdir / "2_stops.svg")
    first = shown[0]
    what = "blocks after which the next byte is predicted, 6 on average"
    drawing.shaded_text(first["text"], first["blocks"], outdir / "3_exits_on_text.png", what=what)
    what = "where the controller would end the completion (a tenth of all bytes)"
    stop = [float(value) for value in first["stop"]]
    drawing.shaded_text(first["text"], stop, outdir / "4_stops_on_text.png", what=what)


def exits(results: dict[str, Any], shown: list[Any], path: Path) -> None:
    """Accuracy against mean blocks: exits by the controller, by confidence, at random, and one for all."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    mean = lambda arm, key: np.mean([f[key] for f in drawing.figures_of(results, arm)])
    for index, (name, label) in enumerate(
        {"controller": "controller", "confident": "largest probability"}.items()
    ):
        curve = np.mean([one["exits"][name] for one in shown], axis=0)
        axes.plot(*curve.T, "o-", ms=3, lw=1.2, color=f"C{index}", label=label)
    points = [(mean(f"random_{t}", "blocks"), mean(f"random_{t}", "accuracy")) for t in (6, 9)]
    axes.plot(*np.asarray(points).T, "s", color="C3", label="random, the controller's histogram")
    heads = [mean(f"head_{n}", "accuracy") for n in DEPTHS]
    union = [mean(f"head_{n}", "union") for n in DEPTHS]
    axes.plot(DEPTHS, heads, ".-", color="C2", lw=1, label="one exit for all")
    axes.plot(DEPTHS, union, ":", color="0.4", lw=1.2, label="right at this exit or an earlier one")
    axes.set(xlabel="mean blocks a byte, of 12", ylabel="share of bytes that are right")
    axes.legend(fontsize=7)
    drawing.save(figure, path)


def stops(shown: list[Any], path: Path) -> None:
    """Precision against the share of bytes that are stopped."""
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    for index, (name, label) in enumerate(
        {"controller": "controller", "doubt": "low probability at full depth"}.items()
    ):
        rate, precision = np.mean([one["stops"][name] for one in shown], axis=0).T
        axes.plot(rate, precision, "o-", ms=3, lw=1.2, color=f"C{index}", label=label)
    axes.set(
        xlabel="share of bytes that are stopped", ylabel="share of them that no exit gets right"
    )
    axes.legend(fontsize=7)
    drawing.save(figure, path)
