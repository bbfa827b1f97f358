"""Weights laid out for decoding: what is contracted lies last in memory (`dyncomp_kernels.dense_matmul` tells why)."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dyncomp_kernels.dense_matmul.api import weights_transposed

CONTRACTED = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""How many leading axes of a parameter of a decoder are contracted, by its name."""


@struct.dataclass
class Packed:
    """A parameter [k... n...] as a matrix [n k].

    Attributes:
      matrix: its two-dimensional transpose.
      shape: the parameter's own (static).
    """

    matrix: Any
    shape: tuple[int, ...] = struct.field(pytree_node=False)


def worthwhile() -> bool:
    """Whether this process decodes faster from packed weights: on CPUs (`dyncomp_kernels.dense_matmul`)."""
    return jax.default_backend() == "cpu"


def pack(params: Mapping[str, Any]) -> Any:
    """The parameters with every matrix product's weights as `Packed`; banks of experts and the rest as they are."""

    def packed(path: Any, leaf: Any) -> Any:
        axes = CONTRACTED.get(getattr(path[-1], "key", ""), 0)
        attention = axes and leaf.ndim == (3 if path[-1].key in ("q", "k", "v", "out") else 2)
        if not attention:
            return leaf
        inner = math.prod(leaf.shape[:axes])
        return Packed(jnp.asarray(leaf.reshape(inner, -1).T), leaf.shape)

    return jax.tree_util.tree_map_with_path(packed, params)


def unpacked(params: Any) -> Any:
    """The parameters as the model wants them: views, where the compiler folds the transpose into the product."""
    own = lambda node: isinstance(node, Packed)
    restore = lambda node: node.matrix.T.reshape(node.shape) if own(node) else node
    return jax.tree.map(restore, params, is_leaf=own)


@contextlib.contextmanager
def told(params: Any) -> Iterator[Any]:
    """`unpacked` parameters, and while inside, the products know whether those lie transposed."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Packed))
    packed = any(isinstance(leaf, Packed) for leaf in leaves)
    with weights_transposed() if packed else contextlib.nullcontext():
        yield unpacked(params)
