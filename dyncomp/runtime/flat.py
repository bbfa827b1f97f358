"""Segments as functions of lists of arrays: what is compiled, and what can be saved without the model's source."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.runtime.check import check_shapes
from dyncomp.runtime.graph import Graph
from dyncomp.runtime.liveness import everything_moves, find_liveness
from dyncomp.runtime.segments import Segmented
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
      moved: of each segment, bytes of one row that it reads from the buffer and writes back.
    """

    graph: Graph
    prices: tuple[Cost, ...]
    thresholds: Any
    row: jax.ShapeDtypeStruct
    carry: list[jax.ShapeDtypeStruct]
    weights: list[Leaves]
    functions: list[Callable[[int], Callable[..., tuple]]]
    moved: list[tuple[int, int]]

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
        """The function jitted; it may overwrite the buffer.

        What it does not use stays an argument: equal programs take equal arguments at the same places.
        """
        donated = () if self.graph.ends(index) else (1,)
        run = self.functions[index](bucket)
        return jax.jit(run, donate_argnums=donated, keep_unused=True)


def flatten(net: Segmented, example: Any, liveness: bool = True) -> Flat:
    """A network's segments; of ``example`` only shape and dtype of a row are read.

    Args:
      net: the network.
      example: inputs.
      liveness: False gathers and writes every leaf around every segment, whoever wants it (to see what it costs).

    Raises:
      DyncompError: segments that do not fit each other, or weights that are being differentiated or traced.
    """
    graph = Graph.of(net)
    row = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
    one = jax.ShapeDtypeStruct((1, *row.shape), row.dtype)
    refuse_tracers((net.begin_weights, [segment.weights for segment in net.segments]))
    check_shapes(net, graph, one)
    carry = jax.eval_shape(net.begin, net.begin_weights, one)
    leaves, tree = jax.tree.flatten(carry)
    found = find_liveness(net, graph, carry) if liveness else everything_moves(graph, len(leaves))
    weights: list[Leaves] = []
    functions: list[Callable[[int], Callable[..., tuple]]] = []
    for index, segment in enumerate(net.segments):
        own = (net.begin_weights, segment.weights) if index == 0 else segment.weights
        flat, structure = jax.tree.flatten(own)
        weights.append([jnp.asarray(leaf) for leaf in flat])
        moves = _Moves(tree, found.written[index], graph.chain, forced=not liveness)
        functions.append(_always(_function(net, graph, index, structure, moves)))
    slots = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
    prices = tuple(segment.cost for segment in net.segments)
    moved = found.moved(slots)
    return Flat(graph, prices, net_thresholds(net), row, slots, weights, functions, moved)


def refuse_tracers(tree: Any) -> None:
    """Executors that the host drives have no gradients, and are no part of a traced program.

    Raises:
      DyncompError: a leaf is being differentiated or traced.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise DyncompError(
            "the host drives this executor, so it can't be differentiated, compiled or vmapped: use Traced(net)"
        )


@dataclasses.dataclass(frozen=True)
class _Moves:
    """How one segment fetches its carry and puts it back.

    Attributes:
      tree: the carry's structure.
      written: leaves that are put back.
      chain: nobody waits at another segment; a launch of all slots may then overwrite those that are not its own.
      forced: fetch all leaves, wanted or not; else the compiler leaves out what the segment does not read.
    """

    tree: Any
    written: frozenset[int]
    chain: bool
    forced: bool

    def gather(self, buffer: Leaves, rows: Any) -> Any:
        """The carry of some slots, or of all as they stand."""
        take = lambda leaf: leaf if _whole(leaf, rows) else leaf.at[rows].get(mode="clip")
        leaves = [take(leaf) for leaf in buffer]
        return self.tree.unflatten(jax.lax.optimization_barrier(leaves) if self.forced else leaves)

    def write(self, buffer: Leaves, rows: Any, carry: Any) -> Leaves:
        """The buffer with it."""
        whole = _replaced if self.chain else _kept
        put = lambda leaf, new: (whole if _whole(leaf, rows) else _scattered)(leaf, rows, new)
        both = enumerate(zip(buffer, jax.tree.leaves(carry), strict=True))
        return [put(old, new) if n in self.written else old for n, (old, new) in both]


def _whole(leaf: Any, rows: Any) -> bool:
    return leaf.shape[0] == rows.shape[0]


def _scattered(leaf: Any, rows: Any, new: Any) -> Any:
    """Writes rows at their slots."""
    return leaf.at[rows].set(new.astype(leaf.dtype), mode="drop")


def _replaced(leaf: Any, rows: Any, new: Any) -> Any:
    """Every slot's new row."""
    return new.astype(leaf.dtype)


def _kept(leaf: Any, rows: Any, new: Any) -> Any:
    """Every slot's new row, where there is one."""
    real = (rows < leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))
    return jnp.where(real, new.astype(leaf.dtype), leaf)


def _always(function: Callable[..., tuple]) -> Callable[[int], Callable[..., tuple]]:
    """The same for every row count."""
    return lambda bucket: function


def _function(
    net: Segmented, graph: Graph, index: int, structure: Any, moves: _Moves
) -> Callable[..., tuple]:
    """Gathers, runs and writes back what the segment changed and others want."""
    run = net.segments[index].run

    def fn(weights: Leaves, buffer: Leaves, rows: Any, threshold: Any, inputs: Any = None) -> tuple:
        own = structure.unflatten(weights)
        if index == 0:
            first, own = own
            carry = net.begin(first, inputs)
        else:
            carry = moves.gather(buffer, rows)
        carry, *result = run(own, carry, threshold)
        if graph.ends(index):
            return [], *result
        return moves.write(buffer, rows, carry), *result

    return fn
