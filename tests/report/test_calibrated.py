"""The calibration of exits: figures of hand-made outputs, and the section of a page."""

import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.report import calibrated


def made(n=400):
    """Two exits, two classes. The first says 0.8 and is right in 8 of 10, the second says 0.9 and is always right."""
    labels = np.arange(n) % 2
    right = np.arange(n) % 10 < 8
    said = np.where(right, labels, 1 - labels)
    first = np.where(np.eye(2)[said] > 0, 0.8, 0.2)
    second = np.where(np.eye(2)[labels] > 0, 0.9, 0.1)
    exits = np.where(right, 0, 1)
    return {"logits": np.log(np.stack([first, second])), "targets": labels, "exit": exits}


def test_figures_by_hand():
    first, second, emitted = calibrated.figures(calibrated.Outputs.of(made()))
    assert first["accuracy"] == pytest.approx(0.8)
    assert first["ece"] == pytest.approx(0, abs=1e-9)
    # Distance to the one-hot label: 2 x 0.2^2 where right, 2 x 0.8^2 where wrong.
    assert first["brier"] == pytest.approx(0.8 * 0.08 + 0.2 * 1.28)
    assert first["leave"] == pytest.approx(0.8)
    # A fifth of the scores 1 - p is 0.8, more than the miss rate: only sets of both classes cover 95 %.
    assert (first["set_size"], first["coverage"]) == (2, 1)
    assert second["ece"] == pytest.approx(0.1)
    assert second["brier"] == pytest.approx(0.02)
    assert (second["set_size"], second["coverage"]) == (1, 1)
    # Those that leave at the first exit are right there, with 0.8.
    assert emitted["accuracy"] == 1
    assert emitted["ece"] == pytest.approx(0.8 * 0.2 + 0.2 * 0.1)
    assert (emitted["set_size"], emitted["coverage"]) == (1, 1)


def test_a_curve_has_a_point_where_several_examples_are():
    outputs = calibrated.Outputs.of(made())
    x, y = calibrated.reliability_curve(outputs.probabilities[0], outputs.labels)
    np.testing.assert_allclose((x, y), ([0.8], [0.8]))
    few = calibrated.Outputs.of(made(calibrated.SEVERAL - 1))
    assert len(calibrated.reliability_curve(few.probabilities[0], few.labels)[0]) == 0


def test_arrays_that_do_not_fit_are_refused():
    for change in ({"targets": np.zeros(3, int)}, {"logits": np.full((2, 400, 2), np.nan)}):
        with pytest.raises(DyncompError, match=r"expected finite \[x n c\]"):
            calibrated.Outputs.of({**made(), **change})
