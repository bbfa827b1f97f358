"""The mesh: how many devices each axis gets."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from dyncomp.core.errors import DyncompError

AXES = ("data", "fsdp", "sequence", "tensor", "expert")
"""Names of the mesh axes, slowest first."""

BATCH_AXES = ("data", "fsdp", "expert")
"""Axes over which a batch is split (parameters may be split over some of them too)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Devices per axis; at most one entry is -1 and gets the rest.

    Attributes:
      data: copies of the parameters, each with its own part of the batch.
      fsdp: parts of the parameters and optimizer state, gathered for use; also splits the batch.
      sequence: parts of every sequence's activations, and like fsdp of parameters; does not split the batch. How
        positions see those of other devices is `attention.Attention.across`.
      tensor: parts of each matrix product (heads, hidden units, vocabulary); does not split the batch.
      expert: parts of the stacked expert weights; also splits the batch.
      rules: changes to the table of `dyncomp.parallel.rules`, e.g. ``{"kv_heads": None}``.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    rules: Mapping[str, Any] | None = None

    def __post_init__(self):
        free = [axis for axis in AXES if getattr(self, axis) == -1]
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1 and size != -1:
                raise DyncompError(
                    f"MeshSpec.{axis}={size}: use a positive number, or -1 for the rest"
                )
        if len(free) > 1:
            raise DyncompError(
                f"MeshSpec: {' and '.join(free)} are -1; only one axis can get the rest"
            )

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices per axis on ``devices`` devices.

        Raises:
          DyncompError: the product does not fit.
        """
        given = {axis: getattr(self, axis) for axis in AXES}
        product = math.prod(size for size in given.values() if size != -1)
        said = " x ".join(f"{axis}={size}" for axis, size in given.items() if size != 1) or "data=1"
        if -1 in given.values():
            if devices % product:
                raise DyncompError(
                    f"mesh {said}: {devices} devices are not a multiple of {product}"
                )
            return {
                axis: devices // product if size == -1 else size for axis, size in given.items()
            }
        if product != devices:
            raise DyncompError(f"mesh {said} needs {product} devices but there are {devices}")
        return given

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh on ``devices`` (default: all of this program)."""
        devices = jax.devices() if devices is None else list(devices)
        sizes = self.sizes(len(devices))
        shape, types = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
        try:
            return jax.make_mesh(shape, AXES, types, devices=devices)
        except NotImplementedError:  # an axis of 8 on a torus of 4 x 4 x 4: part of a physical one
            placed = create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(placed, AXES, axis_types=types)


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.shape)


def check_batch(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a global batch that the mesh cannot split evenly.

    Raises:
      DyncompError: names the sizes and the fix.
    """
    parts = batch_parts(mesh)
    if batch_size % parts:
        raise DyncompError(
            f"batch size {batch_size} is not a multiple of {parts} (mesh {dict(mesh.shape)} splits it over "
            f"{' x '.join(BATCH_AXES)}); change the batch size or the mesh"
        )
