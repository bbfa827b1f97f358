"""Where each leaf of a training state and a batch lives.

Names come from the boxes that `dyncomp.core.sharding.param` puts around parameters. A leaf elsewhere in the state
(moments, averages, accumulated gradients) follows the parameter whose path ends its own and whose shape it has;
all other leaves are replicated.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import MeshAxes, axis_rules, to_spec
from dyncomp.core.typing import PyTree
from dyncomp.parallel.mesh import BATCH_AXES, check_batch
from dyncomp.parallel.rules import known

Names = Mapping[tuple[str, ...], tuple[tuple[str | None, ...], tuple[int, ...]]]
"""Path of a parameter -> (logical names, shape)."""


def logical_names(boxed: PyTree) -> Names:
    """Logical names and shape of every boxed leaf, by path below its collection.

    Args:
      boxed: parameters as ``jax.eval_shape(model.init, ...)["params"]`` returns them (or the whole variables).
    """
    if isinstance(boxed, Mapping) and "params" in boxed:
        boxed = boxed["params"]
    is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        if is_box(leaf):
            found[_keys(path)] = (tuple(leaf.names), tuple(leaf.unbox(False).shape))
    return found


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings_for(
    boxed: PyTree, state: PyTree, mesh: Mesh, rules: Mapping[str, MeshAxes] | None = None
) -> tuple[PyTree, NamedSharding]:
    """Shardings of a whole training state and of its batches.

    Args:
      boxed: abstract variables of the model with their boxes, ``jax.eval_shape(model.init, ...)``.
      state: the state, arrays or ShapeDtypeStructs, without boxes.
      mesh: devices.
      rules: table of logical names, default `RULES`.

    Returns:
      A pytree like ``state`` of NamedShardings, and the sharding of every leaf of a batch (first axis split).

    Raises:
      DyncompError: a dimension is not a multiple of its mesh axis, or a name is not in the table.
    """
    return placed(logical_names(boxed), state, mesh, rules), batch_sharding(mesh)


def placed(
    names: Names, tree: PyTree, mesh: Mesh, rules: Mapping[str, MeshAxes] | None = None
) -> PyTree:
    """A pytree like ``tree`` of NamedShardings; see `shardings_for`."""
    with axis_rules(known(mesh, rules)):
        place = lambda path, leaf: NamedSharding(mesh, _spec(_keys(path), leaf, names, mesh))
        return jax.tree_util.tree_map_with_path(place, tree)


def held_bytes(tree: PyTree, places: PyTree) -> int:
    """Bytes of a pytree's parts on one device.

    Args:
      tree: arrays or ShapeDtypeStructs.
      places: NamedShardings, a tree like it.
    """
    part = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(part, tree, places)))


def _spec(path: tuple[str, ...], leaf: Any, names: Names, mesh: Mesh) -> PartitionSpec:
    for start in range(len(path)):
        found = names.get(path[start:])
        if found and found[1] == tuple(leaf.shape):
            spec = to_spec(found[0])
            _check_divisible("/".join(path[start:]), found, spec, mesh)
            return spec
    return PartitionSpec()


def _check_divisible(name: str, found: Any, spec: PartitionSpec, mesh: Mesh) -> None:
    for axis, size, over in zip(*found, spec, strict=True):
        axes = (over,) if isinstance(over, str) else over or ()
        parts = math.prod(mesh.shape[a] for a in axes)
        if size % parts:
            raise DyncompError(
                f"{name}: {axis!r} has {size} entries, not a multiple of mesh axis {'x'.join(axes)}={parts}; "
                f"change the mesh or set MeshSpec.rules = {{{axis!r}: None}}"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over the axes that split the batch; other dimensions are whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Whole on every device, so that every process can read it; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def process_rows(batch_size: int, mesh: Mesh | None) -> np.ndarray:
    """Which rows of a global batch this process's devices hold, int64, ascending.

    Processes that share rows (a mesh that splits tensors over them) both get them.

    Raises:
      DyncompError: the batch cannot be split evenly.
    """
    rows = np.arange(batch_size)
    if mesh is None:
        return rows
    check_batch(batch_size, mesh)
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([rows[index] for index in held.values()]))


def make_global_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh | None, size: int | None = None
) -> dict[str, Any]:
    """Global arrays from this process's rows of a batch; a plain device copy without a mesh.

    Args:
      batch: numpy arrays whose first axis is the rows that `process_rows` names.
      mesh: devices of all processes.
      size: rows of the global batch; default, what ``batch`` holds (one process).

    Raises:
      DyncompError: the global batch cannot be split evenly.
    """
    if mesh is None:
        return jax.device_put(dict(batch))
    sharding = batch_sharding(mesh)
    made = {}
    for name, value in batch.items():
        shape = (size or value.shape[0], *value.shape[1:])
        check_batch(shape[0], mesh)
        made[name] = jax.make_array_from_process_local_data(sharding, np.asarray(value), shape)
    return made
