"""Image classification: scikit-learn's digits (embedded), Fashion-MNIST (Debian package, folder or hub), hub sets."""

import dataclasses
import functools
import gzip
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.tasks.base import ArraySource, Source, Split, Task, check_split
from dyncomp.tasks.hub import load_hub
from dyncomp.tasks.objectives import ClassificationObjective, classification_metrics

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MEAN, FASHION_STD = 72.94, 90.02  # of the training pixels, 0..255
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Enlarged:
    """A source whose images are enlarged batch by batch.

    Attributes:
      source: of batches with ``inputs`` [b h w c].
      times: what height and width are multiplied with.
    """

    source: Source
    times: int

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ``indices``."""
        found = self.source.batch(indices)
        return {**found, "inputs": found["inputs"].repeat(self.times, 1).repeat(self.times, 2)}


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A source whose images are shrunk batch by batch: every square of pixels becomes its mean.

    Attributes:
      source: of batches with ``inputs`` [b h w c].
      times: side of a square; divides height and width.
    """

    source: Source
    times: int

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ``indices``."""
        found, k = self.source.batch(indices), self.times
        b, h, w, c = found["inputs"].shape
        squares = found["inputs"].reshape(b, h // k, k, w // k, k, c)
        return {**found, "inputs": squares.mean(axis=(2, 4), dtype=np.float32)}


@dataclasses.dataclass(frozen=True)
class ImageTask(Task):
    """Base of the image tasks: ``inputs`` float32 [b h w c] standardised, ``targets`` int32 [b].

    Attributes:
      label_smoothing: see `ClassificationObjective`.
      enlarge: every pixel becomes a square of enlarge x enlarge pixels.
      shrink: every square of shrink x shrink pixels becomes its mean.
    """

    headline: ClassVar[str] = "accuracy"
    minimize: ClassVar[bool] = False
    classes: ClassVar[int] = 10

    label_smoothing: float = 0.0
    enlarge: int = 1
    shrink: int = 1

    def arrays(self) -> Mapping[str, Arrays]:
        """Split -> inputs and targets."""
        raise NotImplementedError

    def source(self, split: Split) -> Source:
        """Examples of a split."""
        check_split(split)
        if self.enlarge < 1:
            raise DyncompError(f"{type(self).__name__}.enlarge={self.enlarge}: use 1 or more")
        found: Source = ArraySource(self.arrays()[split])
        if self.shrink != 1:
            side = self.arrays()[split]["inputs"].shape[1:3]
            if self.shrink < 1 or any(length % self.shrink for length in side):
                raise DyncompError(
                    f"{type(self).__name__}.shrink={self.shrink}: use a divisor of the sides, {side}"
                )
            found = Shrunk(found, self.shrink)
        return found if self.enlarge == 1 else Enlarged(found, self.enlarge)

    def objective(self) -> ClassificationObjective:
        """Cross-entropy."""
        return ClassificationObjective(label_smoothing=self.label_smoothing)

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The images with the batch's range stretched to 0..1."""
        low, high = inputs.min(), inputs.max()
        return {"images": ((inputs - low) / (high - low or 1.0)).astype(np.float32)}

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """See `classification_metrics`."""
        return classification_metrics(output, batch)


def shuffled_parts(count: int, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Indices of each part after one fixed shuffle; the last part takes the rest."""
    order = np.random.Generator(np.random.PCG64(20240607)).permutation(count)
    parts, start = {}, 0
    for name, share in shares.items():
        stop = start + round(share * count)
        parts[name] = np.sort(order[start:stop])
        start = stop
    parts[name] = np.sort(np.concatenate([parts[name], order[start:]]))
    return parts


def standardize(images: np.ndarray, mean: float, std: float) -> np.ndarray:
    """[n h w] or [n h w c] of any dtype to float32 [n h w c]."""
    images = images if images.ndim == 4 else images[..., None]
    return ((images.astype(np.float32) - mean) / std).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _digits() -> dict[str, Arrays]:
    from sklearn.datasets import load_digits

    pixels, digits = (np.asarray(values) for values in load_digits(return_X_y=True))
    images, labels = standardize(pixels.reshape(-1, 8, 8), 4.88, 6.02), digits.astype(np.int32)
    shares = {"test": 0.2, "calibration": 0.1, "validation": 0.1, "train": 0.6}
    parts = shuffled_parts(len(labels), shares)
    return {s: {"inputs": images[i], "targets": labels[i]} for s, i in parts.items()}


@dataclasses.dataclass(frozen=True)
class Digits(ImageTask):
    """1,797 handwritten digits of 8 x 8 pixels; 60 / 10 / 10 / 20% by a fixed shuffle."""

    def arrays(self) -> Mapping[str, Arrays]:
        """All four splits."""
        return _digits()


def read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of unsigned bytes, plain or gzipped.

    Raises:
      DyncompError: the file is damaged.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raw = b""
    dims = raw[3] if len(raw) > 4 and raw[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = raw[4 + 4 * dims :]
    if not dims or len(body) != int(np.prod(shape)):
        raise DyncompError(f"{path} is no IDX file of bytes, or is cut off: install it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


@functools.lru_cache(maxsize=2)
def _fashion(folder: str) -> dict[str, Arrays]:
    root = Path(folder)
    names = {"train": "train", "test": "t10k"}
    loaded = {}
    for split, stem in names.items():
        files = [next(root.glob(f"{stem}-{kind}*"), None) for kind in ("images", "labels")]
        if None in files:
            raise DyncompError(
                f"no Fashion-MNIST under {folder}: apt-get install dataset-fashion-mnist, set FashionMNIST.path,"
                " or use tasks.HubImages(name='zalando-datasets/fashion_mnist')"
            )
        loaded[split] = [read_idx(file) for file in files]  # type: ignore[arg-type]
    make = lambda images, labels: {
        "inputs": standardize(images, FASHION_MEAN, FASHION_STD),
        "targets": labels.astype(np.int32),
    }
    images, labels = loaded["train"]
    parts = shuffled_parts(
        len(labels), {"calibration": 1 / 12, "validation": 1 / 12, "train": 10 / 12}
    )
    out = {split: make(images[index], labels[index]) for split, index in parts.items()}
    return {**out, "test": make(*loaded["test"])}


@dataclasses.dataclass(frozen=True)
class FashionMNIST(ImageTask):
    """70,000 garments of 28 x 28 pixels (Xiao et al. 2017): 50k train, 5k validation, 5k calibration, 10k test.

    Attributes:
      path: folder of the IDX files; default ``$FASHION_MNIST`` or where Debian's package puts them.
      train_size: train on the first so many images only; 0 for all.
    """

    path: str | None = None
    train_size: int = 0

    def arrays(self) -> Mapping[str, Arrays]:
        """All four splits.

        Raises:
          DyncompError: fewer than no images, or more than there are.
        """
        found = _fashion(self.path or os.environ.get("FASHION_MNIST") or FASHION_FOLDER)
        images = len(found["train"]["inputs"])
        if not 0 <= self.train_size <= images:
            raise DyncompError(
                f"FashionMNIST.train_size={self.train_size}: use at most {images}, or 0 for all"
            )
        if not self.train_size:
            return found
        few = {name: values[: self.train_size] for name, values in found["train"].items()}
        return {**found, "train": few}


@dataclasses.dataclass(frozen=True)
class HubImages(ImageTask):
    """An image data set by its hub name; validation and calibration come from its training split.

    Attributes:
      name: hub name, or a builder ("parquet", "imagefolder") with ``data_files``.
      config: configuration of the data set, if it has several.
      image, label: columns.
      data_files: local files for a builder, e.g. {"train": ..., "test": ...}.
      size: every picture is resized to size x size pixels; 0 keeps them, then all must be of one size.
      color: RGB (3 channels) instead of grey (1 channel).
    """

    name: str = ""
    config: str | None = None
    image: str = "image"
    label: str = "label"
    data_files: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    size: int = 0
    color: bool = True

    def spec(self) -> dict[str, Any]:
        """See `Task.spec`; with ``size`` the data are not looked at."""
        if not self.size:
            return super().spec()
        side = self.size // self.shrink * self.enlarge
        shape = (side, side, 3 if self.color else 1)
        return {
            "inputs": jax.ShapeDtypeStruct(shape, np.float32),
            "targets": jax.ShapeDtypeStruct((), np.int32),
            "mask": jax.ShapeDtypeStruct((), np.float32),
        }

    def arrays(self) -> Mapping[str, Arrays]:
        """All four splits, in memory."""
        return _hub_images(self, tuple(sorted(self.data_files.items())))


def _hub_split(task: HubImages, split: str) -> Arrays:
    table = load_hub(task.name, task.config, task.data_files, split)
    missing = [name for name in (task.image, task.label) if name not in table.column_names]
    if missing:
        raise DyncompError(f"{task.name}: no column {missing[0]!r}; it has {table.column_names}")
    pictures = [picture.convert("RGB" if task.color else "L") for picture in table[task.image]]
    if task.size:
        pictures = [picture.resize((task.size, task.size)) for picture in pictures]
    if len({picture.size for picture in pictures}) != 1:
        raise DyncompError(f"{task.name}: no pictures, or of different sizes: set HubImages.size")
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return {"inputs": pixels, "targets": np.asarray(table[task.label], np.int32)}


@functools.lru_cache(maxsize=2)
def _hub_images(task: HubImages, files: tuple) -> dict[str, Arrays]:
    """``files`` is only part of the key of this memory."""
    train, test = _hub_split(task, "train"), _hub_split(task, "test")
    parts = shuffled_parts(
        len(train["targets"]), {"calibration": 0.1, "validation": 0.1, "train": 0.8}
    )
    pixels = train["inputs"][parts["train"]]
    mean, std = float(pixels.mean()), float(pixels.std()) or 1.0
    take = lambda data, index: {
        "inputs": standardize(data["inputs"][index], mean, std),
        "targets": data["targets"][index],
    }
    out = {split: take(train, index) for split, index in parts.items()}
    return {**out, "test": take(test, np.arange(len(test["targets"])))}
