"""Trained exit maps: what they belong to, and their file."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Variables
from dyncomp.decoding.exiting import check_exits
from dyncomp.pretrained import weights

NAME = re.compile(r"exits\.(\d+)\.map")


@dataclasses.dataclass(frozen=True)
class ExitMaps:
    """Weights of `rules.MappedHead` for some exits of one model.

    Attributes:
      exits: how many blocks have run at each; increasing.
      maps: float32 [y d d], added to the identity.
    """

    exits: tuple[int, ...]
    maps: Float[Array, "y d d"]

    def check(self, model: Any) -> None:
        """Refuses a model of another width or with fewer blocks.

        Raises:
          DyncompError: so.
        """
        width = self.maps.shape[-1]
        if width != model.d_model:
            raise DyncompError(
                f"these exit maps are for a width of {width}, the model's is {model.d_model};"
                " train its own with dyncomp train-exits"
            )
        check_exits(self.exits, model.depth)

    def variables(self, variables: Variables) -> Variables:
        """A model's variables with the maps where `rules.MappedHead` looks for them."""
        return {**variables, "exits": {"maps": self.maps}}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, in one step: ``exits.N.map``, float32 [d d], for the exit after N blocks."""
        path, arrays = Path(path), np.asarray(self.maps, np.float32)
        named = {f"exits.{n}.map": ("float32", arrays.shape[1:]) for n in self.exits}
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.tmp")
        weights.write(scratch, named, arrays)
        os.replace(scratch, path)

    @classmethod
    def load(cls, path: str | Path) -> "ExitMaps":
        """Reads what `save` wrote.

        Raises:
          DyncompError: a damaged file, or one that holds something else.
        """
        tensors = weights.read_header(Path(path))
        found = {int(m[1]): t for name, t in tensors.items() if (m := NAME.fullmatch(name))}
        kinds = {(t.dtype, t.shape) for t in found.values()}
        if len(found) < len(tensors) or len(kinds) != 1 or not _square(*kinds):
            raise DyncompError(
                f"{path} holds no exit maps; give a file that dyncomp train-exits wrote"
            )
        exits, raw = tuple(sorted(found)), Path(path).read_bytes()
        read = lambda t: np.frombuffer(raw[t.start : t.stop], "<f4").reshape(t.shape)
        return cls(exits, jnp.asarray(np.stack([read(found[n]) for n in exits])))


def _square(kind: tuple[str, tuple[int, ...]]) -> bool:
    dtype, shape = kind
    return dtype == "F32" and len(shape) == 2 and shape[0] == shape[1]
