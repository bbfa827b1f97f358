"""A picture, a text and the answer's words in one row of numbers: what models of several inputs take as ``inputs``."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextRow:
    """The layout of a row: pixels, then the text's token ids, then those that the decoder reads; 0 is padding.

    Runs, executors and the pod compile hand one array to a model. Ids are whole numbers in float32, exact below 2^24.

    Attributes:
      height, width, channels: of the picture.
      text: tokens of the text.
      answer: tokens that the decoder reads, the start included.
    """

    height: int
    width: int
    channels: int
    text: int
    answer: int

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 1:
            raise DyncompError(f"{self}: every size must be 1 or more")

    @property
    def pixels(self) -> int:
        """Numbers of the picture."""
        return self.height * self.width * self.channels

    @property
    def size(self) -> int:
        """Numbers of a row."""
        return self.pixels + self.text + self.answer

    def pack(
        self,
        images: Float[np.ndarray, "b h w _"],
        text: Int[np.ndarray, "b q"],
        answer: Int[np.ndarray, "b t"],
    ) -> Float[np.ndarray, "b m"]:
        """Rows, float32."""
        parts = images.reshape(len(images), -1), text, answer
        return np.concatenate([part.astype(np.float32) for part in parts], axis=1)

    def unpack(
        self, rows: Float[Array | np.ndarray, "b m"]
    ) -> tuple[Float[Array, "b h w _"], Int[Array, "b q"], Int[Array, "b t"]]:
        """(images float32, text int32, answer int32).

        Raises:
          DyncompError: rows of another size.
        """
        if rows.shape[1] != self.size:
            raise DyncompError(f"rows of {rows.shape[1]} numbers; {self} has {self.size}")
        rows = jnp.asarray(rows)
        images = rows[:, : self.pixels]
        ids = rows[:, self.pixels :].astype(jnp.int32)
        shape = (rows.shape[0], self.height, self.width, self.channels)
        return images.reshape(shape), ids[:, : self.text], ids[:, self.text :]
