"""Quality against compute: needed, executed and measured, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyncomp.report.figure import COLORS, plain, svg
from dyncomp.report.load import RunFiles, mapping, number

AXES = {
    "flops_needed": "needed FLOPs per element",
    "flops_executed": "executed FLOPs per element",
    "seconds": "measured seconds per batch",
}


def points(run: RunFiles, axis: str) -> list[tuple[float, float]]:
    """(compute, quality) of a run's settings, ordered by compute; a run without a sweep gives its final figures."""
    final = {**mapping(run.summary.get("quality")), **mapping(run.summary.get("compute"))}
    rows = run.pareto or [final]
    pairs = [(number(row.get(axis)), number(row.get(run.headline))) for row in rows]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def front(found: Sequence[tuple[float, float]], minimize: bool) -> list[tuple[float, float]]:
    """The points that no other point beats in both compute (less) and quality."""
    best: list[tuple[float, float]] = []
    sign = 1.0 if minimize else -1.0
    for x, y in sorted(found, key=lambda point: (point[0], sign * point[1])):
        if not best or sign * y < sign * best[-1][1]:
            best.append((x, y))
    return best


def pareto(runs: Sequence[RunFiles]) -> str:
    """The runs' settings and fronts as SVG; the runs share a headline metric. "" when no run has a point."""
    axes_with_points = [axis for axis in AXES if any(points(run, axis) for run in runs)]
    if not axes_with_points:
        return ""
    headline = runs[0].headline
    better = "lower" if runs[0].summary.get("minimize", True) else "higher"

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(axes_with_points), squeeze=False, sharey=True)[0]
        for axis, axes in zip(axes_with_points, grid, strict=True):
            for n, run in enumerate(runs):
                _scatter(axes, run, axis, COLORS[n % len(COLORS)])
            axes.set(xlabel=AXES[axis])
            axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 4))
        grid[0].set_ylabel(plain(f"{headline} ({better} is better)"))
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=8)

    width = 3.3 * len(axes_with_points) + 0.4
    return svg(draw, title=f"{headline} against compute", size=(width, 3.4))


def _scatter(axes: Any, run: RunFiles, axis: str, color: str) -> None:
    found = points(run, axis)
    if found:
        minimize = bool(run.summary.get("minimize", True))
        axes.plot(*zip(*front(found, minimize), strict=True), color=color, lw=1.2, alpha=0.7)
        axes.plot(*zip(*found, strict=True), "o", ms=4.5, color=color, label=plain(run.name))


def write_pareto(runs: Sequence[RunFiles], out: Path) -> Path | None:
    """Saves the plot of the runs that share the first one's headline metric; None when there is nothing to plot."""
    text = pareto([run for run in runs if run.headline == runs[0].headline])
    if not text:
        return None
    out.write_text(text.replace("currentColor", "#222222"))
    return out
