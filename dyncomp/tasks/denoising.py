"""Images for diffusion: any image task's pictures in [-1, 1], padded and averaged to a smaller size if asked for."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.metrics import Mean
from dyncomp.diffusion.objectives import DenoisingObjective
from dyncomp.tasks.base import ArraySource, Split, Task, check_split
from dyncomp.tasks.images import ImageTask


@dataclasses.dataclass(frozen=True)
class Denoising(Task):
    """Clean images float32 [b h w c]; a model adds the noise (`models.ExitingDenoiser`).

    ``targets`` are the classes, which nothing here reads.

    Attributes:
      images: whose pictures; its training split's least and largest value become -1 and 1.
      pad: pixels added on every side, as dark as the darkest.
      shrink: squares of shrink x shrink pixels are averaged.
    """

    headline: ClassVar[str] = "mse"
    minimize: ClassVar[bool] = True

    images: ImageTask
    pad: int = 0
    shrink: int = 1

    def __post_init__(self):
        if self.pad < 0 or self.shrink < 1:
            raise DyncompError(
                f"Denoising: pad={self.pad}, shrink={self.shrink}; use pad >= 0 and shrink >= 1"
            )

    def source(self, split: Split) -> ArraySource:
        """Examples of a split."""
        check_split(split)
        return ArraySource(_scaled(self)[split])

    def spec(self) -> dict[str, Any]:
        """See `Task.spec`."""
        found = dict(self.images.spec())
        h, w, c = found["inputs"].shape
        side = lambda length: _side(length, self.pad, self.shrink)
        found["inputs"] = jax.ShapeDtypeStruct((side(h), side(w), c), np.float32)
        return found

    def objective(self) -> DenoisingObjective:
        """All three losses."""
        return DenoisingObjective()

    def describe(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The images in 0..1."""
        return {"images": np.clip((inputs + 1.0) / 2.0, 0.0, 1.0).astype(np.float32)}

    def metrics(self, output: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Mean]:
        """Mean squared error of the noise each image stops with, and of the whole network's."""
        mask, noise = jnp.asarray(batch["mask"]), output["noise"]
        each = lambda said: Mean.of(jnp.mean(jnp.square(said - noise), axis=(1, 2, 3)), mask)
        return {"mse": each(output["emitted"]), "mse_final": each(output["final"])}


def _side(length: int, pad: int, shrink: int) -> int:
    side, rest = divmod(length + 2 * pad, shrink)
    if rest:
        raise DyncompError(
            f"Denoising: {length} pixels and {2 * pad} of padding are no multiple of shrink={shrink}"
        )
    return side


@functools.lru_cache(maxsize=2)
def _scaled(task: Denoising) -> dict[str, dict[str, np.ndarray]]:
    """All splits, in memory."""
    arrays = task.images.arrays()
    low, high = (float(f(arrays["train"]["inputs"])) for f in (np.min, np.max))

    def fit(images: np.ndarray) -> np.ndarray:
        images = (np.asarray(images) - low) / ((high - low) or 1.0) * 2.0 - 1.0
        wide = [(0, 0), (task.pad, task.pad), (task.pad, task.pad), (0, 0)]
        images = np.pad(images, wide, constant_values=-1.0)
        n, h, w, c = images.shape
        k = task.shrink
        rows, columns = _side(h, 0, k), _side(w, 0, k)
        return images.reshape(n, rows, k, columns, k, c).mean(axis=(2, 4)).astype(np.float32)

    return {split: {**found, "inputs": fit(found["inputs"])} for split, found in arrays.items()}
