"""Scenes of a few coloured shapes: a question with a short answer, or a description in words."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.core.typing import Array, Bool, Float, Int
from dyncomp.exits.layerwise import LayerwiseObjective
from dyncomp.models.packed import ImageTextRow
from dyncomp.tasks.base import SPLITS, Split, Task, check_split
from dyncomp.tasks.objectives import answer_of, token_nll

Kind = Literal["answer", "caption", "both"]

COLOURS = {
    "red": (0.9, 0.2, 0.2), "green": (0.2, 0.75, 0.25), "blue": (0.2, 0.35, 0.95),
    "yellow": (0.9, 0.85, 0.2),
}  # fmt: skip
SHAPES = ("circle", "square", "cross")
PLACES = tuple(f"place-{number}" for number in range(1, 10))
SPECIAL = ("<pad>", "<start>", "<end>")
FORMS = ("colour-at", "shape-at", "colour-of", "place-of")
WORDS = (*SPECIAL, *COLOURS, *SHAPES, *PLACES, *FORMS, "left-of", "above", "describe")
WORD = {word: number for number, word in enumerate(WORDS)}
PAD, START, END = (WORD[word] for word in SPECIAL)


@functools.lru_cache
def stencil(shape: str, side: int) -> Bool[np.ndarray, "s s"]:
    """The pixels of a shape in a square of ``side`` pixels."""
    centre = (side - 1) / 2
    y, x = np.mgrid[:side, :side] - centre
    if shape == "circle":
        return y**2 + x**2 <= (centre + 0.25) ** 2
    if shape == "cross":
        return (np.abs(x) <= side / 6) | (np.abs(y) <= side / 6)
    return np.ones((side, side), bool)


@dataclasses.dataclass(frozen=True)
class ShapeSource:
    """Examples made on demand: a pure function of the task, the split and the index."""

    task: "ShapeScenes"
    split: Split

    def __len__(self) -> int:
        return self.task.examples

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """See `ShapeScenes`."""
        made = [self.task.example(self.split, int(index)) for index in indices]
        rows = {name: np.stack([one[name] for one in made]) for name in made[0]}
        packed = self.task.row.pack(*(rows.pop(name) for name in ("image", "text", "reads")))
        return {"inputs": packed, **rows}


@dataclasses.dataclass(frozen=True)
class ShapeScenes(Task):
    """A noisy picture of shapes on a grid, and a text that says what is wanted.

    A scene has distinct shapes in distinct colours, each in a cell of its own, moved by up to two pixels. ``answer``
    asks "colour-at PLACE", "shape-at PLACE", "colour-of SHAPE" or "place-of SHAPE" of something that is there and wants
    one word; places are the cells in reading order. ``caption`` says "describe" and wants the first two shapes in that
    order: "red circle left-of blue square" where they lie in one row, "above" else; "red circle" where there is one;
    then the end. "both" mixes them.

    A batch holds ``inputs`` float32 [b m] (`ImageTextRow`: the picture, the text, and the words that the decoder
    reads), ``targets`` int32 [b t], ``mask`` float32 [b t], 1 for words that count.

    Attributes:
      kind: see above.
      side: pixels of a side.
      grid: cells of a side; ``side / grid`` pixels a cell, of which a shape leaves 2 free.
      captions: share of descriptions in "both"; each has up to six words to a question's one.
      most: shapes of a scene.
      noise: standard deviation of the pixels' noise.
      text: tokens of a text, padding included; 2 or more.
      words: most words of an answer; 1 will do for "answer", captions need 6.
      examples: of each split.
    """

    headline: ClassVar[str] = "accuracy"
    minimize: ClassVar[bool] = False

    kind: Kind = "both"
    side: int = 20
    grid: int = 2
    captions: float = 0.25
    most: int = 3
    noise: float = 0.1
    text: int = 2
    words: int = 6
    examples: int = 65_536

    def __post_init__(self):
        if self.kind not in ("answer", "caption", "both"):
            raise DyncompError(f"ShapeScenes.kind={self.kind!r}: use 'answer', 'caption' or 'both'")
        if not 1 <= self.grid <= 3 or self.side % self.grid or self.side // self.grid < 5:
            raise DyncompError(
                f"ShapeScenes: side={self.side}, grid={self.grid}; use 1 to 3 cells of 5 pixels or more"
            )
        if not 1 <= self.most <= min(len(SHAPES), self.grid**2):
            raise DyncompError(
                f"ShapeScenes.most={self.most}: use 1 to {min(len(SHAPES), self.grid**2)} shapes"
            )
        if self.text < 2:
            raise DyncompError(f"ShapeScenes.text={self.text}: questions have two words")
        if self.words < (1 if self.kind == "answer" else 6):
            raise DyncompError(f"ShapeScenes.words={self.words}: captions need 6, answers 1")

    @property
    def row(self) -> ImageTextRow:
        """How inputs lie."""
        return ImageTextRow(
            height=self.side, width=self.side, channels=3, text=self.text, answer=self.words
        )

    def example(self, split: Split, index: int) -> dict[str, np.ndarray]:
        """One example: image [h w 3], text [q], reads, targets [t] and mask [t]."""
        draw = np.random.Generator(np.random.Philox(key=[SPLITS.index(split), index]))
        captions = self.kind == "caption" or (self.kind == "both" and draw.random() < self.captions)
        count = int(draw.integers(1, self.most + 1))
        shapes = draw.permutation(len(SHAPES))[:count]
        colours = draw.permutation(len(COLOURS))[:count]
        cells = np.sort(draw.permutation(self.grid**2)[:count])
        named = [(list(COLOURS)[c], SHAPES[s]) for c, s in zip(colours, shapes, strict=True)]
        image = self._picture(draw, named, cells)
        text, said = self._caption(named, cells) if captions else _question(draw, named, cells)
        targets = [WORD[word] for word in said] + [END] * captions
        mask = np.zeros(self.words, np.float32)
        mask[: len(targets)] = 1.0
        return {
            "image": image,
            "text": _padded([WORD[word] for word in text], self.text),
            "reads": _padded([START, *targets[:-1]], self.words),
            "targets": _padded(targets, self.words),
            "mask": mask,
        }

    def _picture(self, draw, named, cells) -> Float[np.ndarray, "h w 3"]:
        cell = self.side // self.grid
        image = np.zeros((self.side, self.side, 3), np.float32)
        for (colour, shape), place in zip(named, cells, strict=True):
            top, left = (
                cell * part + int(draw.integers(0, 3)) for part in divmod(place, self.grid)
            )
            own = stencil(shape, cell - 2)
            size = slice(top, top + cell - 2), slice(left, left + cell - 2)
            image[size][own] = COLOURS[colour]
        noise = draw.standard_normal(image.shape, np.float32)
        return (2.0 * (image + np.float32(self.noise) * noise) - 0.5).astype(np.float32)

    def _caption(self, named, cells) -> tuple[list[str], list[str]]:
        first = list(named[0])
        if len(named) == 1:
            return ["describe"], first
        rows = [place // self.grid for place in cells[:2]]
        relation = "left-of" if rows[0] == rows[1] else "above"
        return ["describe"], [*first, relation, *named[1]]

    def source(self, split: Split) -> ShapeSource:
        """Examples of a split; splits share none but by chance."""
        check_split(split)
        return ShapeSource(self, split)

    def spec(self) -> dict[str, Any]:
        """Shapes from the options alone."""
        make = jax.ShapeDtypeStruct
        return {
            "inputs": make((self.row.size,), jnp.float32),
            "targets": make((self.words,), jnp.int32),
            "mask": make((self.words,), jnp.float32),
        }

    def objective(self) -> LayerwiseObjective:
        """Cross-entropy of every decoder layer."""
        return LayerwiseObjective()

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The pictures in 0..1."""
        images, _, _ = self.row.unpack(inputs)
        return {"images": np.clip(np.asarray(images) / 2 + 0.25, 0, 1).astype(np.float32)}

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """``accuracy``, the share of answers that are right throughout, of the words emitted; nll (nats a word).

        A model that may leave early also gets ``accuracy_final``, without exits, and ``time``, layers run over all.
        """
        mask, targets = jnp.asarray(batch["mask"]), jnp.asarray(batch["targets"])
        logits, some = answer_of(output), jnp.max(mask, axis=1)
        found = {
            "accuracy": Mean.of(right_throughout(logits, targets, mask), some),
            "nll": Mean.of(token_nll(logits, targets), mask),
        }
        if isinstance(output, Mapping):
            final = right_throughout(answer_of(output, "final"), targets, mask)
            found["accuracy_final"] = Mean.of(final, some)
            if "time" in output:
                found["time"] = Mean.of(output["time"], mask)
        return found


def right_throughout(
    logits: Float[Array, "b t v"],
    targets: Int[Array | np.ndarray, "b t"],
    mask: Float[Array | np.ndarray, "b t"],
) -> Bool[Array, "b"]:
    """Whether the likeliest word is the right one wherever the mask says that it counts."""
    return jnp.all((jnp.argmax(logits, axis=-1) == targets) | (jnp.asarray(mask) == 0), axis=1)


def _padded(ids: list[int], length: int) -> Int[np.ndarray, "n"]:
    own = np.zeros(length, np.int32)
    own[: len(ids)] = ids
    return own


def _question(
    draw: Any, named: list[tuple[str, str]], cells: Int[np.ndarray, "n"]
) -> tuple[list[str], list[str]]:
    """(text, answer) about one of the scene's shapes."""
    form, chosen = FORMS[int(draw.integers(len(FORMS)))], int(draw.integers(len(named)))
    (colour, shape), place = named[chosen], PLACES[int(cells[chosen])]
    asked = place if form.endswith("-at") else shape
    said = {"colour": colour, "shape": shape, "place": place}[form.split("-")[0]]
    return [form, asked], [said]
