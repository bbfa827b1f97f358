"""What segments hand on is of one kind: said by shapes alone, before anything is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import Segmented


def check_shapes(net: Segmented, graph: Graph, inputs: Any) -> Any:
    """Shape and dtype of the output, [b ...].

    Args:
      net: the network.
      graph: its own.
      inputs: [b ...], or what has a shape and a dtype.

    Raises:
      DyncompError: a segment changes the carry's structure, shapes or dtypes, gives another kind of output than the
        first, or a route or score that is not [b].
    """
    rows = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    carry = jax.eval_shape(net.begin, net.begin_weights, rows)
    tau, wanted = jax.ShapeDtypeStruct((), jnp.float32), None
    for name, segment in zip(graph.names, net.segments, strict=True):
        handed, output, route, score = jax.eval_shape(segment.run, segment.weights, carry, tau)
        if _kinds(handed) != _kinds(carry):
            raise DyncompError(
                f"segment {name!r} got a carry of {_told(carry)} and hands on {_told(handed)}; keep it alike"
            )
        wanted = output if wanted is None else wanted
        if _kinds(output) != _kinds(wanted):
            raise DyncompError(
                f"segment {name!r} gives an output of {_told(output)}, the first {_told(wanted)}; make them alike"
            )
        for what, leaf in (("route", route), ("score", score)):
            if leaf.shape != rows.shape[:1]:
                raise DyncompError(
                    f"segment {name!r} gives a {what} of shape {leaf.shape}; one for each of {rows.shape[0]} examples"
                )
    return wanted


def _kinds(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _told(tree: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree))


def check_inputs(inputs: np.ndarray, row: jax.ShapeDtypeStruct) -> None:
    """Refuses inputs for which nothing was compiled, before anything is launched or queued.

    Args:
      inputs: [b ...].
      row: shape and dtype of one example's input.

    Raises:
      DyncompError: their rows are of another shape or dtype.
    """
    wanted, got = (jax.dtypes.canonicalize_dtype(each.dtype) for each in (row, inputs))
    if inputs.ndim == 0 or inputs.shape[1:] != row.shape or got != wanted:
        shape = ", ".join(["b", *map(str, row.shape)])
        raise DyncompError(
            f"inputs of {got}{list(inputs.shape)}: this executor was made for {wanted}[{shape}]; convert them, or make"
            " it with an example like them"
        )
