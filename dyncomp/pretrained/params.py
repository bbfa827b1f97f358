"""Parameters of a backbone, filled from tensors one leaf at a time."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import current_mesh, to_spec
from dyncomp.models import DecoderLM
from dyncomp.models.layout import STACKED
from dyncomp.pretrained.architectures import Architecture
from dyncomp.pretrained.layout import Entry
from dyncomp.pretrained.weights import Weights

IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
"""Buffers that old checkpoints saved beside their weights."""

ALIGNMENT = 64
"""Bytes; a host array that starts on such an address becomes a CPU array without a copy."""


BLOCK = 1 << 23
"""Bytes of a file that are resident at a time."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter, stacked over layers (and experts).

    Attributes:
      path: keys in the tree.
      shape, dtype: as stored.
      names: logical axis names.
      entry: its line in the architecture's table.
      layers: number in the whole model of each entry of the first axis; empty outside blocks.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str | None, ...]
    entry: Entry
    layers: tuple[int, ...] = ()

    @property
    def places(self) -> list[tuple[int, ...]]:
        """All indices of the lead axes."""
        return list(np.ndindex(*self.shape[: self.entry.lead]))

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of what one tensor gives."""
        return self.shape[self.entry.lead :]

    def tensor(self, place: tuple[int, ...]) -> str:
        """Name of the tensor for one index of the lead axes."""
        return self.entry.name(self.layers[place[0]] if place else 0, place)


def leaves(model: DecoderLM, architecture: Architecture) -> list[Leaf]:
    """All parameters of a backbone and where they come from.

    Raises:
      DyncompError: a parameter that the architecture has no tensor for.
    """
    table = {(entry.ours, entry.rank): entry for entry in architecture.entries}
    mesh = current_mesh()
    tokens = jnp.zeros((mesh.size if mesh else 1, 1), jnp.int32)  # rows that any mesh can split
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
    found = []
    for keys, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        path = tuple(key.key for key in keys)
        leaf = box.unbox(False) if is_box(box) else box
        inside = STACKED in path
        own = ("/".join(path[3:] if inside else path), len(leaf.shape))
        if own not in table:
            raise DyncompError(f"{architecture.model_type}: no tensor for parameter {own[0]}")
        names = tuple(box.names) if is_box(box) else (None,) * len(leaf.shape)
        layers = _layers(model, path) if inside else ()
        found.append(Leaf(path, leaf.shape, np.dtype(leaf.dtype), names, table[own], layers))
    return found


def _layers(model: DecoderLM, path: tuple[str, ...]) -> tuple[int, ...]:
    """Numbers in the whole model of a block's repetitions."""
    index, block = int(path[0].removeprefix("group_")), int(path[2].removeprefix("block_"))
    start = sum(group.repeat * len(group.blocks) for group in model.groups[:index])
    group = model.groups[index]
    return tuple(start + n * len(group.blocks) + block for n in range(group.repeat))


def check(
    found: list[Leaf], weights: Weights, architecture: Architecture, tied: bool
) -> dict[str, str]:
    """Compares all shapes before anything is allocated; returns table name -> name in the file.

    Raises:
      DyncompError: a tensor is missing, has another shape, or has no place in the architecture.
    """
    names: dict[str, str] = {}
    for leaf in found:
        if math.prod(leaf.shape[: leaf.entry.lead]) > len(weights.tensors):
            raise DyncompError(
                f"{weights.folder.name}: {len(weights.tensors)} tensors, but config.json asks for more layers or"
                " experts; they are of different models"
            )
        for place in leaf.places:
            name = leaf.tensor(place)
            short = name.removeprefix(architecture.optional_prefix)
            names[name] = name if name in weights.tensors else short
            _check_shape(names[name], leaf, weights)
    rest = [n for n in weights.tensors if n not in set(names.values()) and not IGNORED.search(n)]
    if tied and "lm_head.weight" in rest:
        rest.remove("lm_head.weight")
    if rest:
        raise DyncompError(
            f"{weights.folder.name}: {len(rest)} tensors have no place in a {architecture.model_type} model with this"
            f" config.json (first: {min(rest)}); is config.json that of another model?"
        )
    return names


def _check_shape(name: str, leaf: Leaf, weights: Weights) -> None:
    if name not in weights.tensors:
        raise DyncompError(
            f"{weights.folder.name}: tensor {name} is missing; fetch the weights again"
        )
    found, expected = weights.tensors[name].shape, leaf.entry.shape(leaf.inner)
    if found != expected:
        raise DyncompError(
            f"{weights.folder.name}: {name} is {found}, but config.json asks for {expected}; they are of different"
            " models"
        )


def read(
    model: DecoderLM, architecture: Architecture, weights: Weights, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The stacked parameters, each cast to its dtype and put on its devices; one leaf is on the host at a time.

    Under ``mesh`` a process reads only what its own devices hold.
    """
    found = leaves(model, architecture)
    names = check(found, weights, architecture, model.tie_embeddings)
    tree: dict[str, Any] = {}
    for leaf in found:
        node = tree
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = jax.block_until_ready(_put(leaf, weights, names, mesh))
    return tree


def _put(leaf: Leaf, weights: Weights, names: Mapping[str, str], mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(_fill(leaf, weights, names, (slice(None),) * len(leaf.shape)))
    sharding = NamedSharding(mesh, to_spec(leaf.names))
    try:
        sharding.shard_shape(leaf.shape)
    except ValueError as error:
        raise DyncompError(
            f"{'/'.join(leaf.path)}: shape {leaf.shape} does not split over the mesh {dict(mesh.shape)}; change the"
            " mesh or the axis rules"
        ) from error
    make = lambda index: _fill(leaf, weights, names, index)
    return jax.make_array_from_callback(leaf.shape, sharding, make)


def _fill(
    leaf: Leaf, weights: Weights, names: Mapping[str, str], index: tuple[slice, ...]
) -> np.ndarray:
    """One shard of a leaf, read from the file tensor by tensor."""
    spans = [range(n)[part] for n, part in zip(leaf.shape, index, strict=True)]
    out = empty(tuple(map(len, spans)), leaf.dtype)
    lead = leaf.entry.lead
    for place in np.ndindex(*out.shape[:lead]):
        name = names[leaf.tensor(tuple(span[i] for span, i in zip(spans, place, strict=False)))]
        view = leaf.entry.view(weights.view(name), leaf.inner)
        drop = functools.partial(weights.release, name)
        _copy(out[place], view[tuple(index[lead:])], drop)
    return out


def _copy(out: np.ndarray, view: np.ndarray, drop: Callable[[], None]) -> None:
    """Casts a view of a file into ``out``, block by block in the file's order, dropping the pages of each block."""
    axis = int(np.argmax(view.strides))
    step = max(1, BLOCK * view.shape[axis] // max(1, view.nbytes))
    for start in range(0, view.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        out[part] = view[part]
        drop()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An aligned array that a CPU device can take over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
