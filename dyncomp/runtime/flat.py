"""Segments as functions of lists of arrays: what is compiled, and what can be saved without the model's source."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.core.ledger import Cost
from dyncomp.runtime.check import check_shapes
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.segments import Carry, Segmented
from dyncomp.runtime.traced import net_thresholds

Leaves = list[Any]


@dataclasses.dataclass(frozen=True)
class Flat:
    """A network over one buffer of slots.

    Attributes:
      graph: where examples may go.
      prices: of each segment, an example.
      thresholds: float32 [s].
      row: shape and dtype of one example's input.
      carry: shape and dtype of one slot's leaves.
      weights: of each segment; equal arrays are one object.
      functions: of each segment, by row count, ``(weights, buffer, rows, threshold[, inputs]) -> (buffer, output,
        route, score)``. Rows past the buffer are padding; as many rows as slots stand each at its own. Only the first
        takes inputs; one after which all leave gives an empty buffer.
    """

    graph: Graph
    prices: tuple[Cost, ...]
    thresholds: Any
    row: jax.ShapeDtypeStruct
    carry: list[jax.ShapeDtypeStruct]
    weights: list[Leaves]
    functions: list[Callable[[int], Callable[..., tuple]]]

    def arguments(self, index: int, bucket: int, capacity: int) -> tuple[Any, ...]:
        """Shapes and dtypes of a function's arguments."""
        many = lambda n, leaf: jax.ShapeDtypeStruct((n, *leaf.shape), leaf.dtype)
        given = (
            [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in self.weights[index]],
            [many(capacity, leaf) for leaf in self.carry],
            jax.ShapeDtypeStruct((bucket,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.float32),
        )
        return (*given, many(bucket, self.row)) if index == 0 else given

    def program(self, index: int, bucket: int) -> Any:
        """The function jitted; it may overwrite the buffer."""
        donated = () if self.graph.ends(index) else (1,)
        return jax.jit(self.functions[index](bucket), donate_argnums=donated)


def flatten(net: Segmented, example: Any) -> Flat:
    """A network's segments; of ``example`` only shape and dtype of a row are read."""
    graph = Graph.of(net)
    row = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
    one = jax.ShapeDtypeStruct((1, *row.shape), row.dtype)
    check_shapes(net, graph, one)
    carry = jax.eval_shape(net.begin, net.begin_weights, one)
    leaves, tree = jax.tree.flatten(carry)
    weights: list[Leaves] = []
    functions: list[Callable[[int], Callable[..., tuple]]] = []
    for index, segment in enumerate(net.segments):
        own = (net.begin_weights, segment.weights) if index == 0 else segment.weights
        flat, structure = jax.tree.flatten(own)
        weights.append([jnp.asarray(leaf) for leaf in flat])
        functions.append(_always(_function(net, graph, index, structure, tree)))
    slots = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    prices = tuple(segment.cost for segment in net.segments)
    return Flat(graph, prices, net_thresholds(net), row, slots, weights, functions)


def _always(function: Callable[..., tuple]) -> Callable[[int], Callable[..., tuple]]:
    """The same for every row count."""
    return lambda bucket: function


def _function(
    net: Segmented, graph: Graph, index: int, structure: Any, tree: Any
) -> Callable[..., tuple]:
    """Gathers, runs and writes back what the segment changed."""
    run = net.segments[index].run

    def fn(weights: Leaves, buffer: Leaves, rows: Any, threshold: Any, inputs: Any = None) -> tuple:
        own = structure.unflatten(weights)
        whole = all(leaf.shape[0] == rows.shape[0] for leaf in buffer)
        if index == 0:
            first, own = own
            carry = net.begin(first, inputs)
            same = [False] * len(buffer)
        else:
            take = lambda leaf: leaf if whole else leaf.at[rows].get(mode="clip")
            carry = tree.unflatten([take(leaf) for leaf in buffer])
            same = _untouched(run, own, carry, threshold)
        carry, *result = run(own, carry, threshold)
        if graph.ends(index):
            return [], *result
        put = _kept if whole else _scattered
        both = zip(buffer, jax.tree.leaves(carry), same, strict=True)
        return [old if kept else put(old, rows, new) for old, new, kept in both], *result

    return fn


def _scattered(leaf: Any, rows: Any, new: Any) -> Any:
    """Writes rows at their slots."""
    return leaf.at[rows].set(new.astype(leaf.dtype), mode="drop")


def _kept(leaf: Any, rows: Any, new: Any) -> Any:
    """Every slot's new row, where there is one."""
    real = (rows < leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(real, new.astype(leaf.dtype), leaf)


def _untouched(run: Callable[..., Any], weights: Any, carry: Carry, threshold: Any) -> list[bool]:
    """Of each leaf of the carry, whether a segment hands it on as it got it."""
    only = lambda carry, weights, threshold: run(weights, carry, threshold)[0]
    jaxpr = jax.make_jaxpr(only)(carry, weights, threshold).jaxpr
    return [new is old for old, new in zip(jaxpr.invars, jaxpr.outvars, strict=False)]
