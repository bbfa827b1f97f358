"""Scenes of shapes: what is asked can be read off the picture, and examples depend on split and index alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.errors import DyncompError
from dyncomp.models import ImageTextRow
from dyncomp.tasks import ShapeScenes
from dyncomp.tasks.shapes import COLOURS, SHAPES, WORDS, right_throughout, stencil

TASK = ShapeScenes(noise=0.0, captions=0.5, examples=500)


def seen(image, task=TASK):
    """(colour, shape, cell) of every shape, read off the pixels in reading order."""
    image = image / 2 + 0.25
    cell, found = task.side // task.grid, []
    for place in range(task.grid**2):
        row, column = (cell * part for part in divmod(place, task.grid))
        own = image[row : row + cell, column : column + cell]
        there = own.max(-1) > 0.05
        if not there.any():
            continue
        pixel = own[there].mean(0)
        colour = min(COLOURS, key=lambda name: np.abs(np.asarray(COLOURS[name]) - pixel).sum())
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        cut = there[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        for shape in SHAPES:
            own = stencil(shape, cell - 2)
            if own.shape == cut.shape and (own == cut).all():
                found.append((colour, shape, place))
    return found


def read(batch, row, task=TASK):
    """Picture, words of the text, and words of the answer."""
    image, text, reads = (np.asarray(part)[row] for part in task.row.unpack(batch["inputs"]))
    kept = batch["mask"][row] > 0
    said = [WORDS[i] for i in batch["targets"][row][kept]]
    np.testing.assert_array_equal(reads[kept][1:], batch["targets"][row][kept][:-1])
    assert reads[0] == 1 and (reads[~kept] == 0).all() and (batch["targets"][row][~kept] == 0).all()
    return image, [WORDS[i] for i in text if i], said


def test_answers_follow_from_the_picture():
    batch, kinds = TASK.source("train").batch(np.arange(150)), {}
    for row in range(150):
        image, text, said = read(batch, row)
        scene = seen(image)
        by_shape, by_place = {s: (c, p) for c, s, p in scene}, {p: (c, s) for c, s, p in scene}
        assert len(by_shape) == len(by_place) == len({c for c, _, _ in scene}) == len(scene)
        place = lambda word: int(word.removeprefix("place-")) - 1
        kinds.setdefault(text[0], []).append(said)
        if text[0] == "colour-of":
            assert said == [by_shape[text[1]][0]]
        elif text[0] == "place-of":
            assert place(said[0]) == by_shape[text[1]][1]
        elif text[0] == "colour-at":
            assert said == [by_place[place(text[1])][0]]
        elif text[0] == "shape-at":
            assert said == [by_place[place(text[1])][1]]
        elif len(scene) == 1:
            assert said == [*scene[0][:2], "<end>"]
        else:
            first, second = scene[:2]
            relation = "left-of" if first[2] // 2 == second[2] // 2 else "above"
            assert said == [*first[:2], relation, *second[:2], "<end>"]
    assert len(kinds) == 5 and 50 < len(kinds["describe"]) < 100
    assert {len(said) for said in kinds["describe"]} == {3, 6}


def test_examples_depend_on_split_and_index_alone():
    task = ShapeScenes(kind="answer", words=1, examples=9)
    train, other = task.source("train"), task.source("test")
    again = train.batch(np.asarray([7, 3]))
    np.testing.assert_array_equal(again["inputs"][0], train.batch(np.asarray([7]))["inputs"][0])
    assert not np.array_equal(again["inputs"][0], other.batch(np.asarray([7]))["inputs"][0])
    assert {k: v.shape for k, v in task.spec().items()} == {
        k: v.shape[1:] for k, v in again.items()
    }
    assert len(train) == 9 and again["targets"].shape == (2, 1)


def test_an_answer_is_right_when_all_its_words_are():
    batch = TASK.source("validation").batch(np.arange(40))
    logits = 9.0 * np.eye(len(WORDS), dtype=np.float32)[batch["targets"]]
    longest = int(batch["mask"].sum(1).argmax())
    logits[longest, 3] = logits[longest, 3, ::-1]  # one word of one answer
    logits[batch["mask"] == 0] = 0.0
    right = right_throughout(jnp.asarray(logits), batch["targets"], batch["mask"])
    assert right.sum() == 39 and not right[longest]
    found = TASK.metrics(jnp.asarray(logits), batch)
    assert found["accuracy"].value() == pytest.approx(39 / 40)
    output = {
        "emitted": jnp.asarray(logits),
        "final": jnp.asarray(logits) * 0,
        "time": jnp.ones((40, 6)),
    }
    found = TASK.metrics(output, batch)
    assert found["accuracy_final"].value() == 0.0 and found["time"].value() == 1.0


def test_rows_hold_what_was_packed():
    row = ImageTextRow(height=2, width=3, channels=1, text=2, answer=3)
    images = np.arange(12, dtype=np.float32).reshape(2, 2, 3, 1)
    text, answer = np.asarray([[1, 0], [60_000, 2]]), np.asarray([[1, 2, 3], [4, 5, 2**24 - 1]])
    got = row.unpack(row.pack(images, text, answer))
    for part, want in zip(got, (images, text, answer), strict=True):
        np.testing.assert_array_equal(part, want)
    with pytest.raises(DyncompError, match="rows of 5"):
        row.unpack(np.zeros((1, 5), np.float32))
    with pytest.raises(DyncompError, match="1 or more"):
        ImageTextRow(height=2, width=3, channels=1, text=0, answer=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "vqa"}, "'answer', 'caption' or 'both'"),
        ({"grid": 3}, "3 cells of 5"),
        ({"most": 4}, "1 to 3"),
        ({"words": 5}, "captions need 6"),
        ({"text": 1}, "two words"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(unchecked, change, message):
    with pytest.raises(DyncompError, match=message):
        ShapeScenes(**change)
