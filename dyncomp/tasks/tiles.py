"""Dense prediction on tiles of pictures, where half of the answers lie on another tile: find the twin."""

import colorsys
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.tasks.base import SPLITS, Split, Task, check_split
from dyncomp.tasks.images import Digits, FashionMNIST, HubImages
from dyncomp.tasks.objectives import ClassificationObjective, classification_metrics, each

TINT = 0.6
"""Share of the colour in a pixel; the rest is the picture."""


@dataclasses.dataclass(frozen=True)
class TwinTiles(Task):
    """Tiles in pairs of one colour, of which one shows a picture and its twin is blank; every patch is classified.

    The answer on both tiles is the class of the picture: on a shown tile it can be seen, on a blank one it must be
    found by colour. Examples are drawn by their index, so a split is as large as asked for; pictures come from the same
    split of ``images``. A batch holds ``inputs`` float32 [b h w 3], ``targets`` int32 [b t] for patches in row-major
    order, ``mask`` [b], and for metrics and pictures ``distance`` int32 [b t], rows or columns (the larger) to the
    shown twin, 0 on shown tiles, and ``twin`` int32 [b t], that tile.

    Attributes:
      images: where pictures come from (square, grey).
      side: tiles of a row and of a column, even.
      shrink: pictures lose resolution by this factor (means of pixels).
      patch: side of a patch in pixels.
      far: ``accuracy_far`` is that on blank tiles at this distance and more.
      train, held_out: examples of the training split and of each other one.
    """

    headline: ClassVar[str] = "accuracy"
    minimize: ClassVar[bool] = False

    images: FashionMNIST | Digits | HubImages = FashionMNIST()  # noqa: RUF009
    side: int = 4
    shrink: int = 2
    patch: int = 7
    far: int = 3
    train: int = 200_000
    held_out: int = 2_000

    def __post_init__(self):
        if self.side < 2 or self.side % 2:
            raise DyncompError(
                f"TwinTiles.side={self.side}: tiles stand in pairs; use an even number"
            )

    def source(self, split: Split) -> "TileSource":
        """Examples of a split.

        Raises:
          DyncompError: ``shrink`` or ``patch`` does not divide what it cuts.
        """
        check_split(split)
        arrays = self.images.arrays()[split]
        pictures, low = arrays["inputs"][..., 0], arrays["inputs"].min()
        n, height, width = pictures.shape
        if height != width or height % self.shrink or (height // self.shrink) % self.patch:
            raise DyncompError(
                f"TwinTiles: pictures of {height}x{width}, shrink={self.shrink}, patch={self.patch}; tiles must be"
                " square and a whole number of patches"
            )
        small = height // self.shrink
        cut = pictures.reshape(n, small, self.shrink, small, self.shrink).mean((2, 4))
        scaled = (cut - low) / (arrays["inputs"].max() - low)
        return TileSource(self, split, scaled.astype(np.float32), arrays["targets"])

    def objective(self) -> ClassificationObjective:
        """Cross-entropy of every patch."""
        return ClassificationObjective()

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The images in 0..1."""
        return {"images": np.clip(inputs / 2 + 0.5, 0, 1).astype(np.float32)}

    def metrics(self, output: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        """Accuracy of all patches, of shown, blank and far ones, and negative log-likelihood."""
        found = classification_metrics(output, batch)
        right = jax.numpy.argmax(output, axis=-1) == batch["targets"]
        mask, distance = each(batch["mask"], right), jax.numpy.asarray(batch["distance"])
        kinds = {"shown": distance == 0, "blank": distance > 0, "far": distance >= self.far}
        for name, chosen in kinds.items():
            found[f"accuracy_{name}"] = Mean.of(right, mask * chosen)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class TileSource:
    """Random access to the examples of one split.

    Attributes:
      task, split: what they are of.
      pictures: float32 [n p p] in 0..1.
      labels: int32 [n].
    """

    task: TwinTiles
    split: Split
    pictures: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return self.task.train if self.split == "train" else self.task.held_out

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ``indices``; each is a pure function of its index."""
        side, tiles = self.task.side, self.task.side**2
        pairs, code = tiles // 2, SPLITS.index(self.split)
        raw = np.stack(
            [
                np.random.Philox(key=[code, int(index)]).random_raw(tiles + pairs)
                for index in indices
            ]
        )
        order = np.argsort(raw[:, :tiles], axis=1, kind="stable")
        shown, blank = order[:, :pairs], order[:, pairs:]  # tiles of each pair
        chosen = (raw[:, tiles:] % len(self.labels)).astype(np.int64)
        rows = np.arange(len(indices))[:, None]
        own = np.zeros((len(indices), tiles), np.int64)  # the pair of each tile
        own[rows, shown] = own[rows, blank] = np.arange(pairs)
        grey = np.zeros((len(indices), tiles, *self.pictures.shape[1:]), np.float32)
        grey[rows, shown] = self.pictures[chosen]
        pixels = TINT * hues(pairs)[own][:, :, None, None] + (1 - TINT) * grey[..., None]
        places = np.stack(np.divmod(np.arange(tiles), side), axis=-1)
        twin = shown[rows, own]
        distance = np.abs(places[None] - places[twin]).max(axis=-1)
        spread = lambda per_tile: self._spread(per_tile, self.pictures.shape[1] // self.task.patch)
        return {
            "inputs": 2 * self._joined(pixels) - 1,
            "targets": spread(self.labels[chosen][rows, own]),
            "distance": spread(distance),
            "twin": spread(twin),
            "mask": np.ones(len(indices), np.float32),
        }

    def _joined(self, tiles: np.ndarray) -> np.ndarray:
        """[b tiles p p 3] as images [b h w 3]."""
        b, _, p, _, c = tiles.shape
        side = self.task.side
        grid = tiles.reshape(b, side, side, p, p, c).swapaxes(2, 3)
        return np.ascontiguousarray(grid.reshape(b, side * p, side * p, c))

    def _spread(self, per_tile: np.ndarray, patches: int) -> np.ndarray:
        """[b tiles] at every patch, int32 [b t]."""
        grid = per_tile.reshape(-1, self.task.side, self.task.side)
        return grid.repeat(patches, 1).repeat(patches, 2).reshape(len(grid), -1).astype(np.int32)


def hues(count: int) -> np.ndarray:
    """Evenly spaced bright colours, float32 [count 3]."""
    return np.asarray([colorsys.hsv_to_rgb(i / count, 0.9, 0.9) for i in range(count)], np.float32)
