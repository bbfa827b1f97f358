"""Expert parallelism: rows travel to the devices that hold their experts, and back (an all-to-all each way).

Pure functions, called inside a `dyncomp.core.sharding.local_op` on a device's own rows and its own experts. W devices
of the mesh axis ``expert`` hold e/W experts each; G devices of the axis ``tensor`` share an expert, each with a slice
of its hidden units. The parameters lie the same way whatever `Exchange` says, so steps compiled for different ones may
follow each other without moving a weight (Hwang et al. 2023, arXiv 2206.03382, sec. 3.1).
"""

import dataclasses
import math
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.core.sharding import current_mesh, parts, to_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """What moves between the devices that share a layer's experts.

    Attributes:
      slices: r. 0: weights move (every device gathers all experts; nothing else is used then). 1: rows move, and the
        slices of an expert's hidden units are gathered. r > 1, a divisor of G: rows move and are repeated on r devices,
        each with its part of the hidden units, and the results summed. None: all G, no weight moves at all.
      chunks: d, pieces of the rows; the exchange of one piece may overlap the experts of another. A capacity is rounded
        up to a multiple of it.
      inner: devices that are near each other: above 1 the all-to-all goes in two steps, inside groups of this many
        neighbours and then between groups (2DH): larger messages, twice the volume.
      pair_factor: without a capacity, rows that one device may send to another, as a multiple of the even share;
        what is above is dropped and counted. None: as many as there can be, nothing is dropped.
      ragged: without a capacity, send exactly the kept rows on platforms that can (TPU, GPU). False pads everywhere:
        needed on slices of v5e above 4x4, for which the compiler of jax 0.10.2 has no ragged form, and with a
        ``pair_factor`` several times faster on GPUs (docs/benchmarks.md).
    """

    slices: int | None = None
    chunks: int = 1
    inner: int = 1
    pair_factor: float | None = None
    ragged: bool = True

    def __post_init__(self):
        if (self.slices or 0) < 0 or self.chunks < 1 or self.inner < 1:
            raise DyncompError(
                f"Exchange: slices={self.slices} must be 0 or more, chunks={self.chunks} and"
                f" inner={self.inner} 1 or more"
            )
        if self.pair_factor is not None and self.pair_factor <= 0:
            raise DyncompError(f"Exchange.pair_factor={self.pair_factor}: use None or more than 0")


@dataclasses.dataclass(frozen=True)
class Layout:
    """An `Exchange` on a mesh.

    Attributes:
      axis, ways: mesh axis of the experts and its size W.
      group_axis, group: mesh axis of the hidden units and its size G.
      slices: r, from 1 to G.
      chunks, inner, pair_factor, ragged: as in `Exchange`.
    """

    axis: Any
    ways: int
    group_axis: Any = None
    group: int = 1
    slices: int = 1
    chunks: int = 1
    inner: int = 1
    pair_factor: float | None = None
    ragged: bool = True

    def names(self, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
        """How a parameter with logical ``axes`` comes into the `local_op`: split by expert and perhaps hidden unit."""
        kept = ("expert", "mlp") if self.slices > 1 else ("expert",)
        return tuple(name if name in kept else None for name in axes)

    def pair_slots(self, rows: int, k: int, num_experts: int) -> int:
        """B: rows that one device may send to another, of ``rows`` with k choices each; a multiple of ``chunks``."""
        most = rows * min(k, num_experts // self.ways)
        if self.pair_factor is not None:
            most = min(most, math.ceil(self.pair_factor * rows * k / self.ways))
        return -(-most // self.chunks) * self.chunks


def layout(options: Exchange, num_experts: int) -> Layout | None:
    """Where experts lie on the current mesh; None where weights move: one device on their axis, or ``slices`` 0.

    Raises:
      DyncompError: sizes that do not divide each other.
    """
    mesh = current_mesh()
    if mesh is None or mesh.manual_axes or options.slices == 0:
        return None
    axis, group_axis = to_spec(("expert",))[0], to_spec(("mlp",))[0]
    ways, group = parts("expert"), parts("mlp")
    if ways == 1:
        return None
    slices = group if options.slices is None else options.slices
    if num_experts % ways:
        raise DyncompError(f"{num_experts} experts on {ways} devices: use a divisor for the axis")
    if group % slices:
        raise DyncompError(
            f"Exchange.slices={slices} does not divide the {group} devices of axis {group_axis!r}"
        )
    if ways % options.inner:
        raise DyncompError(f"Exchange.inner={options.inner} does not divide {ways} devices")
    rest = options.chunks, options.inner, options.pair_factor, options.ragged
    return Layout(axis, ways, group_axis, group, slices, *rest)


def bytes_each_way(
    where: Layout,
    rows: int,
    k: int,
    width: int,
    itemsize: int,
    *,
    num_experts: int,
    slots: int | None,
) -> tuple[int, int]:
    """Bytes of one all-to-all of a device: all that it sends, and what of it leaves the device.

    With ``slots`` (a capacity): e * slots * d * itemsize, slots rounded up to ``chunks``. Without: W *
    `Layout.pair_slots` * d * itemsize; the ragged form sends the kept slots only, at most rows * k * d * itemsize.
    Twice that where ``inner`` is above 1. (W - 1) / W of it leaves the device. A layer has two forward and two
    backward; the dropless form sends e * 4 bytes of counts more, once, and the ragged one W * 4 of offsets.

    Args:
      rows: of the device, with k choices each, ``width`` numbers of ``itemsize`` bytes.
    """
    if slots is None:
        places = where.ways * where.pair_slots(rows, k, num_experts)
    else:
        places = num_experts * (-(-slots // where.chunks) * where.chunks)
    whole = places * width * itemsize * (2 if where.inner > 1 else 1)
    return whole, whole * (where.ways - 1) // where.ways
