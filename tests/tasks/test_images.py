"""Image tasks: parsing, splits, normalisation, metrics."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyncomp.core.errors import DyncompError
from dyncomp.tasks import Digits, FashionMNIST, FeatureTask, HubImages, Task
from dyncomp.tasks.base import SPLITS
from dyncomp.tasks.images import FASHION_FOLDER, read_idx, shuffled_parts

installed = Path(FASHION_FOLDER, "train-images-idx3-ubyte.gz").exists()


def whole(task, split):
    source = task.source(split)
    return source.batch(np.arange(len(source)))


def check(task, counts, shape, shared):
    """Sizes, types, standardisation, and pictures that occur in two splits (at most ``shared``)."""
    data = {split: whole(task, split) for split in SPLITS}
    assert {split: len(d["targets"]) for split, d in data.items()} == counts
    for batch in data.values():
        assert batch["inputs"].shape[1:] == shape and batch["inputs"].dtype == np.float32
        assert batch["targets"].dtype == np.int32 and set(batch["targets"]) == set(range(10))
        assert batch["mask"].all()
    assert abs(data["train"]["inputs"].mean()) < 0.02
    assert abs(data["train"]["inputs"].std() - 1) < 0.02
    seen, twice = {}, 0
    for split, batch in data.items():
        for picture in batch["inputs"]:
            twice += seen.setdefault(picture.tobytes(), split) != split
    assert twice <= shared
    return data


def test_digits():
    from sklearn.datasets import load_digits

    counts = {"train": 1078, "validation": 180, "calibration": 180, "test": 359}
    data = check(Digits(), counts, (8, 8, 1), shared=0)
    joined = np.concatenate([d["inputs"][..., 0] for d in data.values()]) * 6.02 + 4.88
    original = load_digits().images
    key = lambda images: np.sort([image.round().astype(np.uint8).tobytes() for image in images])
    np.testing.assert_array_equal(key(joined), key(original))


def test_shrunk_pixels_are_means_of_squares():
    rows = np.arange(5)
    large, small = (Digits(shrink=k).source("test").batch(rows)["inputs"] for k in (1, 4))
    assert small.shape == (5, 2, 2, 1) and small.dtype == np.float32
    np.testing.assert_allclose(small[:, 0, 1, 0], large[:, :4, 4:, 0].mean(axis=(1, 2)), rtol=1e-5)
    assert Digits(shrink=2, enlarge=2).source("test").batch(rows)["inputs"].shape == (5, 8, 8, 1)
    with pytest.raises(DyncompError, match="divisor"):
        Digits(shrink=3).source("test")


@pytest.mark.skipif(not installed, reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist():
    counts = {"train": 50_000, "validation": 5_000, "calibration": 5_000, "test": 10_000}
    check(FashionMNIST(), counts, (28, 28, 1), shared=60)  # the data set itself repeats a few


def idx(values):
    head = b"\0\0\x08" + bytes([values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture
def tiny(tmp_path):
    rng = np.random.default_rng(0)
    made = {}
    for stem, count in (("train", 120), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 4, 3)), np.arange(count) % 10
        made[stem] = images, labels
        (tmp_path / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path, made


@pytest.mark.parametrize("by", ["field", "environment"])
def test_tiny_idx_files(tiny, by, monkeypatch):
    folder, made = tiny
    monkeypatch.setenv("FASHION_MNIST", str(folder))
    task = FashionMNIST(path=str(folder)) if by == "field" else FashionMNIST()
    test = whole(task, "test")
    images, labels = made["t10k"]
    np.testing.assert_allclose(test["inputs"][..., 0] * 90.02 + 72.94, images, atol=1e-3)
    np.testing.assert_array_equal(test["targets"], labels)
    assert [len(task.source(s)) for s in SPLITS] == [100, 10, 10, 20]
    lookup = {image.tobytes(): label for image, label in zip(*made["train"], strict=True)}
    for split in SPLITS[:3]:
        batch = whole(task, split)
        pixels = (batch["inputs"][..., 0] * 90.02 + 72.94).round().astype(made["train"][0].dtype)
        assert [lookup.pop(image.tobytes()) for image in pixels] == batch["targets"].tolist()
    assert not lookup


def test_a_small_training_set(tiny):
    folder, _ = tiny
    task, full = (FashionMNIST(path=str(folder), train_size=size) for size in (7, 0))
    assert [len(task.source(s)) for s in SPLITS] == [7, 10, 10, 20]
    np.testing.assert_array_equal(
        whole(task, "train")["inputs"], whole(full, "train")["inputs"][:7]
    )
    with pytest.raises(DyncompError, match="train_size=101: use at most 100"):
        FashionMNIST(path=str(folder), train_size=101).source("train")


@pytest.mark.parametrize("damage", ["cut", "cut gzip", "text", "empty"])
def test_damaged_idx(tmp_path, damage):
    raw = idx(np.zeros((5, 2, 2)))
    name = "x.gz" if "gzip" in damage else "x"
    packed = gzip.compress(raw)[:-9]
    content = {"cut": raw[:-1], "cut gzip": packed, "text": b"hello world", "empty": b""}[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DyncompError, match="is no IDX file of bytes, or is cut off"):
        read_idx(tmp_path / name)


def test_missing_fashion_mnist_names_the_fix(tmp_path):
    with pytest.raises(DyncompError, match="apt-get install dataset-fashion-mnist") as error:
        FashionMNIST(path=str(tmp_path)).source("train")
    assert "HubImages" in str(error.value) and "\n" not in str(error.value)


def test_parts_cover_everything_once():
    parts = shuffled_parts(101, {"a": 0.25, "b": 0.25, "c": 0.5})
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(101))
    assert [len(p) for p in parts.values()] == [25, 25, 51]
    assert parts["a"].tolist() != list(range(25))


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(1)
    for split, count in (("train", 30), ("test", 6)):
        for number in range(count):
            folder = tmp_path / split / f"{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8))
            image.save(folder / f"{number}.png")
    return {split: str(tmp_path / split / "**") for split in ("train", "test")}


def test_hub_images_from_a_folder(pictures):
    task = HubImages(name="imagefolder", data_files=pictures)
    assert [len(task.source(s)) for s in SPLITS] == [24, 3, 3, 6]
    train = whole(task, "train")
    assert train["inputs"].shape == (24, 5, 6, 3) and set(train["targets"]) <= {0, 1, 2}
    assert abs(train["inputs"].mean()) < 1e-4 and abs(train["inputs"].std() - 1) < 1e-4
    grey = HubImages(name="imagefolder", data_files=pictures, size=4, color=False)
    assert whole(grey, "test")["inputs"].shape == (6, 4, 4, 1)
    assert grey.spec() == Task.spec(grey)  # what the options say is what the data are
    assert HubImages(name="not/there", size=224).spec()["inputs"].shape == (224, 224, 3)
    with pytest.raises(DyncompError, match="no column 'class'; it has"):
        HubImages(name="imagefolder", data_files=pictures, label="class").source("train")


def test_hub_images_of_different_sizes(pictures, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "0" / "big.png")
    with pytest.raises(DyncompError, match=r"different sizes: set HubImages\.size"):
        HubImages(name="imagefolder", data_files=pictures).source("train")


def test_features():
    arrays = {"inputs": np.arange(12.0, dtype=np.float32).reshape(4, 3), "targets": np.arange(4)}
    task = FeatureTask(arrays={"train": arrays})
    batch = task.source("train").batch(np.asarray([2, 0]))
    np.testing.assert_array_equal(batch["inputs"], [[6, 7, 8], [0, 1, 2]])
    np.testing.assert_array_equal(batch["mask"], [1, 1])
    with pytest.raises(DyncompError, match="no 'test' arrays; it has train"):
        task.source("test")
    with pytest.raises(DyncompError, match="different lengths"):
        FeatureTask(arrays={"train": {**arrays, "targets": np.arange(3)}})
    assert task.headline == "accuracy" and not task.minimize


def test_tasks_are_values():
    """Equal options are equal tasks: they can be keys and be compared between runs."""
    assert FashionMNIST() == FashionMNIST() and hash(Digits()) == hash(Digits())
    assert HubImages(name="a", data_files={}) == HubImages(name="a") and hash(HubImages(name="a"))
    assert json.dumps(Digits().headline) == '"accuracy"'
