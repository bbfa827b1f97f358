"""The pictures of the page: accuracy against time, similarity by depth, accuracy by layer, questions by exit."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from dyncomp.evidence import drawing
from dyncomp.tasks.shapes import WORDS

STREAMS = {"image": "picture", "text": "text", "decoder": "decoder"}
METHODS = {
    "mue": "exits in all three streams", "plain": "the same, last-layer training",
    "joint": "joint encoder", "random": "exits in random order",
}  # fmt: skip
TARGETS = (30, 45, 60)
EACH = 7


def chosen(table: Any, exits: Any, data: Any, task: Any, more: dict[str, Any]) -> dict[str, Any]:
    """What the pictures show of one seed: ``more``, and the first questions that leave at every picture exit.

    Args:
      table: of the method's network on the test questions.
      exits: of each, of picture, text and decoder.
      data: the questions' batch.
      task: reads its rows.
      more: curves, handed on.
    """
    images = task.describe(data["inputs"])["images"]
    _, text, _ = (np.asarray(part) for part in task.row.unpack(data["inputs"]))
    rows = np.concatenate([np.flatnonzero(exits[0] == n)[:EACH] for n in range(len(table.right))])
    said = table.said[(*exits, np.arange(len(images)))]
    word = lambda number: WORDS[int(number)]
    return {
        **more,
        "images": np.round(images[rows], 2).tolist(),
        "exits": [[int(e[row]) + 1 for e in exits] for row in rows],
        "asked": [" ".join(word(i) for i in text[row] if i) for row in rows],
        "said": [word(said[row]) for row in rows],
        "right": [word(data["targets"][row, 0]) for row in rows],
        "histogram": [np.bincount(e, minlength=len(table.right)).tolist() for e in exits],
    }


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    quality(results, shown, outdir / "1_accuracy_against_time.svg")
    similarity(shown, outdir / "2_similarity_by_depth.svg")
    layers(results, shown, outdir / "3_decoder_layers_and_exits.svg")
    questions(shown[0], outdir / "4_questions_by_exit.png")


def quality(results: dict[str, Any], shown: list[Any], path: Path) -> None:
    """Accuracy against expected time reduction, means over seeds."""
    figure, axes = plt.subplots(figsize=(6.8, 4.4))
    mean = lambda arm, key: np.mean([f[key] for f in drawing.figures_of(results, arm)])
    at = lambda arm: (mean(arm, "reduction"), mean(arm, "accuracy"))
    for index, (method, label) in enumerate(METHODS.items()):
        points = np.asarray([at(f"{method}_{target}") for target in TARGETS])
        axes.plot(*points.T, "o-", ms=4, lw=1.2, color=f"C{index}", label=label)
    curve = np.mean([one["confident"] for one in shown], axis=0)
    axes.plot(*curve.T, "v-", ms=4, lw=1.2, color="C4", label="decoder alone, by probability")
    axes.plot(*at("shallow"), "s", color="C5", label="2 + 2 layers")
    axes.plot(*at("whole"), "*", ms=10, color="0.2", label="whole network")
    axes.axvline(37.5, color="0.7", lw=1, ls=":")
    axes.text(36.4, axes.get_ylim()[0] + 1, "most for a decoder alone", rotation=90, fontsize=7,
              ha="right", va="bottom", color="0.4")  # fmt: skip
    axes.set(xlabel="expected time reduction, percent", ylabel="test questions answered, percent")
    axes.legend(fontsize=7)
    drawing.save(figure, path)


def similarity(shown: list[Any], path: Path) -> None:
    """s_i of every stream, each seed a line, the mean bold."""
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.8), sharey=True)
    for index, (name, label) in enumerate(STREAMS.items()):
        curves = np.asarray([one["alike"][name] for one in shown])
        depth = np.arange(1, curves.shape[1] + 1)
        axes[index].plot(depth, curves.T, color=f"C{index}", lw=0.8, alpha=0.5)
        axes[index].plot(depth, curves.mean(0), "o-", color=f"C{index}")
        axes[index].set(title=label, xlabel="layer", xticks=depth)
    axes[0].set(ylabel="cosine of output and input")
    drawing.save(figure, path)


def layers(results: dict[str, Any], shown: list[Any], path: Path) -> None:
    """Accuracy where everyone leaves the decoder at one layer; and where MuE's questions leave at 45 percent."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.2))
    for index, (arms, label) in enumerate(
        {
            ("layer_1", "layer_2", "layer_3", "whole"): "loss at every layer",
            ("plain_layer_1", "plain_layer_2", "plain_layer_3", "plain"): "loss at the last",
        }.items()
    ):
        each = [[f["accuracy"] for f in drawing.figures_of(results, arm)] for arm in arms]
        mean = np.mean(each, axis=1)
        depth = np.arange(1, len(arms) + 1)
        left.plot(depth, each, ".", color=f"C{index}", ms=4, alpha=0.5)
        left.plot(depth, mean, "o-", color=f"C{index}", label=label)
    left.set(xlabel="decoder layer", ylabel="questions answered, percent", xticks=depth)
    left.legend(fontsize=8)
    counts = np.mean([one["histogram"] for one in shown], axis=0)
    for index, (name, row) in enumerate(zip(STREAMS.values(), counts, strict=True)):
        right.bar(depth + 0.27 * (index - 1), row / row.sum(), 0.25, color=f"C{index}", label=name)
    right.set(xlabel="leaves after layer", ylabel="share of questions", xticks=depth)
    right.legend(fontsize=8)
    drawing.save(figure, path)


def questions(one: dict[str, Any], path: Path) -> None:
    """A row of pictures for every picture exit: the question above, the answer below, red where it is wrong."""
    exits = np.asarray(one["exits"])
    used = sorted(set(exits[:, 0].tolist()))
    figure, grid = plt.subplots(
        len(used), EACH, figsize=(EACH * 1.35, len(used) * 1.75), squeeze=False
    )
    for row, depth in zip(grid, used, strict=True):
        mine = np.flatnonzero(exits[:, 0] == depth).tolist()
        for axes, place in zip(row, [*mine, *[None] * (EACH - len(mine))], strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if place is None:
                continue
            axes.imshow(np.asarray(one["images"][place]))
            axes.set_title(one["asked"][place], fontsize=6, pad=2)
            wrong = one["said"][place] != one["right"][place]
            text = f"{one['said'][place]}\ntext {exits[place, 1]}, decoder {exits[place, 2]}"
            axes.set_xlabel(text, fontsize=6, labelpad=2, color="tab:red" if wrong else "black")
        row[0].set_ylabel(f"picture leaves\nafter {depth}", fontsize=7)
    figure.subplots_adjust(hspace=0.5)
    drawing.save(figure, path)
