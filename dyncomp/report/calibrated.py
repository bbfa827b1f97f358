"""How far the probabilities of every exit can be trusted: reliability, calibration errors, conformal sets, classes.

Reads ``logits`` [x n c], ``targets`` [n] and ``exit`` [n] of held-out examples
(`dyncomp.training.exit_outputs.save_exit_outputs`). The first half of the examples calibrates the conformal
thresholds, the second half is what the figures are of.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.exits import calibration
from dyncomp.report.figure import COLORS, svg

ALPHA = 0.05
"""Miss rate of the conformal sets."""
BINS = 10
SEVERAL = 20
"""A point of a reliability curve stands for at least so many examples."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Probabilities [x n c] of every exit, labels [n], and where each example left [n]."""

    probabilities: np.ndarray
    labels: np.ndarray
    exits: np.ndarray

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Outputs":
        """From the arrays of the file.

        Raises:
          DyncompError: shapes that do not fit each other, too few examples, or logits that are not finite.
        """
        logits, labels, exits = (np.asarray(arrays[name]) for name in ("logits", "targets", "exit"))
        fits = logits.ndim == 3 and labels.shape == exits.shape == logits.shape[1:2]
        if not fits or len(labels) < 2 or not np.isfinite(logits).all():
            raise DyncompError(
                f"exits: logits {logits.shape}, targets {labels.shape}, exit {exits.shape}; "
                "expected finite [x n c], [n] and [n] of at least two examples"
            )
        shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        return cls(shifted / shifted.sum(-1, keepdims=True), labels.astype(int), exits.astype(int))

    def rows(self, which: Any) -> "Outputs":
        """Some of the examples."""
        return Outputs(self.probabilities[:, which], self.labels[which], self.exits[which])

    @property
    def emitted(self) -> np.ndarray:
        """What each example leaves with, [n c]."""
        return self.probabilities[self.exits, np.arange(len(self.exits))]


def figures(outputs: Outputs) -> list[dict[str, Any]]:
    """A row for every exit as if all left there, and one for what was emitted, of the second half.

    ``accuracy``, ``ece``, ``brier``, ``leave`` (share that leaves there), ``set_size`` and ``coverage`` of conformal
    sets at `ALPHA`, whose thresholds come from the first half.
    """
    half = len(outputs.labels) // 2
    first, second = outputs.rows(slice(half)), outputs.rows(slice(half, None))
    share = np.bincount(second.exits, minlength=len(outputs.probabilities)) / len(second.labels)
    rows = []
    for index, probabilities in enumerate(second.probabilities):
        here = lambda of, index=index: np.full_like(of.exits, index)
        row = _row(f"exit {index}", probabilities, second, here(second), (first, here(first)))
        rows.append({**row, "leave": float(share[index])})
    return [*rows, _row("emitted", second.emitted, second, second.exits, (first, first.exits))]


def _row(
    name: str,
    probabilities: np.ndarray,
    outputs: Outputs,
    exits: np.ndarray,
    held: tuple[Outputs, np.ndarray],
) -> dict[str, Any]:
    """Figures of probabilities [n c] given at ``exits`` [n]; ``held``: the calibrating half and its exits."""
    own, where = held
    bars = calibration.conformal_thresholds(own.probabilities, own.labels, where, ALPHA)
    sets = calibration.prediction_sets(outputs.probabilities, exits, bars)
    return {
        "where": name,
        "accuracy": float((probabilities.argmax(-1) == outputs.labels).mean()),
        "ece": calibration.ece(probabilities, outputs.labels),
        "brier": calibration.brier(probabilities, outputs.labels),
        "set_size": float(sets.sum(-1).mean()),
        "coverage": calibration.coverage(sets, outputs.labels),
    }


def reliability(outputs: Outputs) -> str:
    """Accuracy against confidence at every exit and of what was emitted, as SVG; the diagonal is perfect."""
    curves = [(f"exit {index}", p) for index, p in enumerate(outputs.probabilities)]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], "--", color="#888888", lw=1)
        for number, (name, probabilities) in enumerate(curves):
            x, y = reliability_curve(probabilities, outputs.labels)
            axes.plot(x, y, "o-", ms=3, lw=1.2, label=name, color=COLORS[number % len(COLORS)])
        x, y = reliability_curve(outputs.emitted, outputs.labels)
        axes.plot(x, y, "k-", lw=2.2, alpha=0.6, label="emitted")
        axes.set(xlabel="largest probability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize=7, loc="upper left")

    return svg(draw, title="reliability of every exit", size=(4.8, 3.6))


def reliability_curve(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(mean largest probability, accuracy) of `BINS` equal bins, those with fewer than `SEVERAL` examples left out."""
    top, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    place = np.clip(np.ceil(top * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    enough = count >= SEVERAL
    mean = lambda values: np.bincount(place, weights=values, minlength=BINS)[enough] / count[enough]
    return mean(top), mean(right.astype(float))


def classes(outputs: Outputs) -> str:
    """Heat map: of each class, the share that leaves at each exit; classes that leave earliest on top. SVG."""
    exits, count = len(outputs.probabilities), outputs.probabilities.shape[-1]
    table = np.zeros((count, exits))
    np.add.at(table, (outputs.labels, outputs.exits), 1)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    order = np.argsort(share @ np.arange(exits), kind="stable")
    shown = order[table[order].sum(1) > 0][:40]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(share[shown], cmap="viridis", aspect="auto", vmin=0, vmax=1)
        axes.grid(False)
        axes.set(xlabel="exit (the last is the full network)", ylabel="class")
        axes.set_xticks(range(exits))
        axes.set_yticks(range(len(shown)), [str(c) for c in shown])
        figure.colorbar(image, ax=axes, format="{x:.0%}")

    return svg(draw, title="exits by class", size=(4.8, 1.2 + 0.24 * len(shown)))
