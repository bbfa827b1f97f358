"""Tiles in pairs of colours: what a picture shows is what its answers say."""

import jax.numpy as jnp
import numpy as np
import pytest

from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.tasks import ClassificationObjective, Digits, TwinTiles
from dyncomp.tasks.images import Enlarged

task = TwinTiles(images=Digits(), shrink=1, patch=4, train=1000, held_out=50)


def cut(batch):
    """Inputs as tiles [b 4 4 8 8 3]."""
    return batch["inputs"].reshape(-1, 4, 8, 4, 8, 3).swapaxes(2, 3)


def test_answers_follow_from_pictures():
    """The class of a tile is that of the only shown tile of its colour, found here from the pixels alone."""
    source, digits = task.source("test"), Digits().source("test").batch(np.arange(359))
    batch = source.batch(np.arange(5))
    tiles, answers = cut(batch), batch["targets"].reshape(5, 8, 8)
    chroma = tiles - tiles.mean(axis=-1, keepdims=True)
    colours = np.round(chroma.mean(axis=(3, 4)), 3)  # grey adds equally to all channels
    shown = tiles.std(axis=(3, 4, 5)) > chroma.std(axis=(3, 4, 5)) + 1e-3
    assert (shown.sum(axis=(1, 2)) == 8).all()
    pictures = digits["inputs"][..., 0] - digits["inputs"].min()
    for n in range(5):
        for r, c in np.ndindex(4, 4):
            same = np.argwhere((np.abs(colours[n] - colours[n, r, c]) < 0.01).all(-1) & shown[n])
            assert len(same) == 1
            y, x = same[0]
            grey = tiles[n, y, x].mean(-1)
            picture = (grey - grey.min()) / np.ptp(grey) * 16 / 16
            gap = np.abs(pictures / pictures.max((1, 2), keepdims=True) - picture).max((1, 2))
            labels = set(digits["targets"][gap < 1e-3].tolist())
            own = answers[n, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            assert set(own.ravel().tolist()) == labels
            distance = batch["distance"].reshape(5, 8, 8)[n, 2 * r, 2 * c]
            assert distance == (0 if shown[n, r, c] else max(abs(y - r), abs(x - c)))
            assert batch["twin"].reshape(5, 8, 8)[n, 2 * r, 2 * c] == 4 * y + x


def test_examples_depend_on_their_index_only():
    source = task.source("train")
    together, alone = source.batch(np.asarray([3, 900])), source.batch(np.asarray([900]))
    for name, values in together.items():
        np.testing.assert_array_equal(values[1], alone[name][0])
    assert len(source) == 1000 and len(task.source("validation")) == 50
    other = task.source("validation").batch(np.asarray([3]))
    assert not np.array_equal(other["twin"], together["twin"][:1])


def test_metrics_tell_shown_from_blank_and_far():
    batch = task.source("test").batch(np.arange(8))
    truth = np.eye(10, dtype=np.float32)[batch["targets"]] * 9
    blind = jnp.asarray(np.where((batch["distance"] > 0)[..., None], np.roll(truth, 1, -1), truth))
    batch["mask"][5:] = 0
    found = task.summarize(task.metrics(blind, batch))
    assert found["accuracy_shown"] == 1 and found["accuracy_blank"] == found["accuracy_far"] == 0
    assert found["accuracy"] == 0.5
    loss, metrics = ClassificationObjective()(jnp.asarray(truth), Aux(), batch, 0)
    expected = np.log(1 + 9 * np.exp(-9.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert float(metrics["nll"].count) == 5 * 64


def test_enlarged_pixels_are_squares():
    small, large = Digits().source("test"), Digits(enlarge=3).source("test")
    assert isinstance(large, Enlarged) and len(large) == len(small)
    pixels = large.batch(np.arange(2))["inputs"]
    assert pixels.shape == (2, 24, 24, 1)
    np.testing.assert_array_equal(pixels[:, 1::3, 2::3], small.batch(np.arange(2))["inputs"])


def test_refusals():
    with pytest.raises(DyncompError, match="use an even number"):
        TwinTiles(side=3)
    with pytest.raises(DyncompError, match="whole number of patches"):
        TwinTiles(images=Digits(), shrink=1, patch=3).source("test")
    with pytest.raises(DyncompError, match="use 1 or more"):
        Digits(enlarge=0).source("test")
