"""What crosses between devices in an exchange of rows: all-to-alls, plain and ragged, and slices of hidden units.

All of it runs inside a `dyncomp.core.sharding.local_op`. Letters: w devices of the expert axis, r devices that share a
row under sliced hidden units, c rows of a piece that one device may send to another.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dyncomp.core.typing import Array, Float, Int
from dyncomp_kernels._compat import vary_like


def all_to_all(x: Array, where: Any) -> Array:
    """[w ...] -> [w ...]: entry j goes to device j; entry i of the result came from device i.

    With ``where.inner`` above 1 in two steps, first between neighbours, then between equal places of all groups.
    """
    if where.inner == 1:
        return lax.all_to_all(x, where.axis, 0, 0)
    inner, outer = where.inner, where.ways // where.inner
    near = [[group * inner + place for place in range(inner)] for group in range(outer)]
    far = [list(column) for column in zip(*near, strict=True)]
    swap = functools.partial(lax.all_to_all, axis_name=where.axis, split_axis=0, concat_axis=0)
    x = x.reshape(outer, inner, *x.shape[1:])
    x = swap(jnp.swapaxes(x, 0, 1), axis_index_groups=near)
    x = swap(jnp.swapaxes(x, 0, 1), axis_index_groups=far)
    return x.reshape(where.ways, *x.shape[2:])


# ---- hidden units in slices


def own_slices(bank: Any, where: Any) -> Any:
    """The part of the hidden units that this device computes, from the bank as `Layout.names` brings it in.

    G/r slices are joined round a ring; their order differs between devices, which hidden units do not mind. A leaf
    without hidden units is added to the output as it is (a bias): each of the r devices adds 1/r of it.
    """
    if where.slices == 1:
        return bank
    turns = where.group // where.slices
    step = lambda s: [(i, (i + where.slices * s) % where.group) for i in range(where.group)]

    def leaf(name: str) -> Array:
        value, axes = getattr(bank, name), bank.axes[name]
        if "mlp" not in axes:
            return value / where.slices
        parts = [
            lax.ppermute(value, where.group_axis, step(s)) if s else value for s in range(turns)
        ]
        return jnp.concatenate(parts, axis=axes.index("mlp"))

    return dataclasses.replace(bank, **{f.name: leaf(f.name) for f in dataclasses.fields(bank)})


def _turn(x: Array, where: Any, by: int) -> Array:
    """``x`` of the device ``by`` places before, in rings of r."""
    r = where.slices
    pairs = [(i, i - i % r + (i % r + by) % r) for i in range(where.group)]
    return lax.ppermute(x, where.group_axis, pairs) if by % r else x


def spread(x: Array, where: Any) -> Array:
    """[...] -> [r ...]: rows of the r devices that hold the same expert's hidden units between them."""
    return jnp.stack([_turn(x, where, by) for by in range(where.slices)])


def collect(y: Array, where: Any) -> Array:
    """[r ...] -> [...]: sums what the r devices made of this device's rows; `spread` transposed."""
    return functools.reduce(jnp.add, [_turn(y[by], where, -by) for by in range(where.slices)])


def count_once(rows: Int[Array, ""], where: Any) -> Int[Array, ""]:
    """Rows that all r devices ran, each a part of: counted on the first of them."""
    if where.slices == 1:
        return rows
    return jnp.where(lax.axis_index(where.group_axis) % where.slices == 0, rows, 0)


# ---- rows of uneven number


@dataclasses.dataclass(frozen=True)
class Route:
    """What is static about one exchange of uneven numbers of rows.

    Attributes:
      where: `dyncomp.experts.exchange.Layout`.
      rows: m, of the contiguous array at home.
      width: c, room for the rows of one pair of devices.
    """

    where: Any
    rows: int
    width: int


class Sizes(NamedTuple):
    """Rows of one piece, by device, int32 [w].

    Attributes:
      starts, sent: where the rows for each device begin at home, and how many there are.
      got, theirs: how many came from each device, and where they begin there.
    """

    starts: Array
    sent: Array
    got: Array
    theirs: Array


class Trip(NamedTuple):
    """One piece: its route, its sizes, and the local expert of each place, int32 [w c] (e/W for an empty one)."""

    route: Route
    sizes: Sizes
    experts: Array


def trips(sizes: Int[Array, "e"], where: Any, rows: int, width: int) -> list[Trip]:
    """The pieces of an exchange of contiguous rows of each expert, ``width`` at most from device to device."""
    table = sizes.reshape(where.ways, -1)
    sent = jnp.sum(table, axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(sent, dtype=jnp.int32) - sent
    come, theirs = lax.all_to_all(table, where.axis, 0, 0), lax.all_to_all(starts, where.axis, 0, 0)
    got, ends = jnp.sum(come, axis=1, dtype=jnp.int32), jnp.cumsum(come, axis=1, dtype=jnp.int32)
    piece, found = width // where.chunks, []
    for index in range(where.chunks):
        low = index * piece
        some = lambda total, low=low: jnp.clip(total - low, 0, piece)
        begin = lambda first, low=low: jnp.minimum(first + low, rows)
        places = low + jnp.arange(piece, dtype=jnp.int32)
        experts = jax.vmap(lambda e, p: jnp.searchsorted(e, p, side="right"), (0, None))(
            ends, places
        )
        each = Sizes(begin(starts), some(sent), some(got), begin(theirs))
        found.append(Trip(Route(where, rows, piece), each, experts.astype(jnp.int32)))
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def there(route: Route, rows: Float[Array, "m d"], sizes: Sizes) -> Float[Array, "w c d"]:
    """Rows to their devices; places without a row are 0. The gradient is `back`."""
    padded, ragged = functools.partial(_pad_there, route), functools.partial(_ragged_there, route)
    return _by_platform(route, padded, ragged, rows, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def back(route: Route, y: Float[Array, "w c o"], sizes: Sizes) -> Float[Array, "m o"]:
    """Results to where their rows came from; rows of other pieces are 0. The gradient is `there`."""
    padded, ragged = functools.partial(_pad_back, route), functools.partial(_ragged_back, route)
    return _by_platform(route, padded, ragged, y, sizes)


there.defvjp(
    lambda route, rows, sizes: (there(route, rows, sizes), sizes),
    lambda route, sizes, g: (back(route, g, sizes), None),
)
back.defvjp(
    lambda route, y, sizes: (back(route, y, sizes), sizes),
    lambda route, sizes, g: (there(route, g, sizes), None),
)


def _by_platform(route: Route, padded: Any, ragged: Any, x: Array, sizes: Sizes) -> Array:
    if route.where.inner > 1 or not route.where.ragged:  # two steps need equal messages
        return padded(x, sizes)
    return lax.platform_dependent(x, sizes, tpu=ragged, cuda=ragged, default=padded)


def _pad_there(route: Route, rows: Array, sizes: Sizes) -> Array:
    places = jnp.arange(route.width, dtype=jnp.int32)[None, :]
    index = jnp.minimum(sizes.starts[:, None] + places, route.rows - 1)
    real = places < sizes.sent[:, None]
    return all_to_all(jnp.where(real[..., None], rows[index], 0), route.where)


def _pad_back(route: Route, y: Array, sizes: Sizes) -> Array:
    come = all_to_all(y, route.where)
    row = jnp.arange(route.rows, dtype=jnp.int32)
    # of devices that begin at the same row all but the last get none
    device = jnp.searchsorted(sizes.starts, row, side="right").astype(jnp.int32) - 1
    place = row - sizes.starts[device]
    real = (device >= 0) & (place < sizes.sent[device])
    return jnp.where(real[:, None], come[device, jnp.minimum(place, route.width - 1)], 0)


def _ragged_there(route: Route, rows: Array, sizes: Sizes) -> Array:
    ways, width = route.where.ways, route.width
    room = vary_like(jnp.zeros((ways * width, rows.shape[1]), rows.dtype), rows)
    here = (lax.axis_index(route.where.axis) * width).astype(jnp.int32)
    offsets = vary_like(jnp.broadcast_to(here, (ways,)), rows)
    out = lax.ragged_all_to_all(
        rows, room, sizes.starts, sizes.sent, offsets, sizes.got, axis_name=route.where.axis
    )
    return out.reshape(ways, width, -1)


def _ragged_back(route: Route, y: Array, sizes: Sizes) -> Array:
    ways, width = route.where.ways, route.width
    room = vary_like(jnp.zeros((route.rows, y.shape[-1]), y.dtype), y)
    offsets = vary_like(jnp.arange(ways, dtype=jnp.int32) * width, y)
    flat = y.reshape(ways * width, -1)
    return lax.ragged_all_to_all(
        flat, room, offsets, sizes.got, sizes.theirs, sizes.sent, axis_name=route.where.axis
    )
