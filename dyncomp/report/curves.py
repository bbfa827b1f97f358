"""Curves of metrics over steps, all runs on one axis."""

from collections.abc import Sequence
from typing import Any

from dyncomp.report.figure import COLORS, plain, svg
from dyncomp.report.load import RunFiles, number

FIRST = ("loss", "nats", "accuracy")
LAST = ("flops_needed", "flops_executed", "grad_norm")
MARKS = {"train": "-", "validation": "--"}


def metric_names(runs: Sequence[RunFiles]) -> list[str]:
    """Metrics with at least two steps somewhere: headlines first, bookkeeping last."""
    seen: dict[str, set[Any]] = {}
    for run in runs:
        for record in run.metrics:
            for name, value in record.items():
                if name not in ("step", "split") and number(value) is not None:
                    seen.setdefault(name, set()).add(record["step"])
    first = [*{run.headline for run in runs}, *FIRST]
    rank = lambda name: 0 if name in first else 2 if name in LAST else 1
    return sorted((name for name, steps in seen.items() if len(steps) > 1), key=rank)


def series(run: RunFiles, metric: str, split: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric on one split."""
    pairs = [
        (float(record["step"]), value)
        for record in run.metrics
        if record.get("split") == split and (value := number(record.get(metric))) is not None
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def curve(runs: Sequence[RunFiles], metric: str) -> str:
    """One metric of all runs as SVG: training solid, validation dashed."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for n, run in enumerate(runs):
            for split, style in MARKS.items():
                steps, values = series(run, metric, split)
                if steps:
                    label = plain(f"{run.name}, {split}")
                    marker = "." if len(steps) < 3 else None
                    axes.plot(
                        steps, values, style, marker=marker, lw=1.4, label=label, color=COLORS[n % len(COLORS)]
                    )  # fmt: skip
        axes.set(xlabel="step", title=plain(metric))
        if axes.lines:
            axes.legend(fontsize=7.5)

    return svg(draw, title=f"{metric} over steps", size=(4.6, 3.0))
