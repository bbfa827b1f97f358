"""The pictures of the page: accuracy against steps, thresholds, where classes stop, and images by step."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

WAYS = {
    "1": "temperature 1",
    "10": "temperature 10",
    "30": "temperature 30 (the paper's code)",
    "100": "temperature 100",
    "mean": "mean of the logits",
}
NETWORKS = {"": "converted", "direct_": "trained through time"}
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
SHOWN = "10"
"""The way to stop whose decisions are drawn, at the early threshold of the converted network."""
WRONG = "tab:red"
COLUMNS = 12


def chosen(judge: Any, images: np.ndarray, results: dict[str, Any]) -> dict[str, Any]:
    """What the pictures show of one network: curves, and where images of each class stop.

    Args:
      judge: ``Judge`` of the experiment.
      images: of the test split [n h w 1].
      results: figures of its arms, thresholds included.
    """
    prefix, test = judge.setup.prefix, judge.test
    found = {"fixed": np.stack([judge.steps, 100.0 * test.right.mean(axis=0)], axis=1)}
    for way in WAYS:
        found[f"front_{way}"], found[f"sweep_{way}"] = judge.front(way), judge.sweep(way)
    scores = test.confidences(SHOWN).max(-1).T
    threshold = results[f"{prefix}early_{SHOWN}"]["threshold"]
    leave = scores > threshold
    leave[:, -1] = True
    stops = leave.argmax(axis=1)
    table = np.zeros((len(judge.steps), len(GARMENTS)), int)
    np.add.at(table, (stops, test.labels), 1)
    rows = np.concatenate([np.flatnonzero(stops == i)[:COLUMNS] for i in range(len(judge.steps))])
    found |= {
        "classes": table, "images": images[rows], "stop": stops[rows], "label": test.labels[rows],
        "said": test.sums.argmax(-1)[stops[rows], rows],
    }  # fmt: skip
    return {f"{prefix}{name}": values for name, values in found.items()}
