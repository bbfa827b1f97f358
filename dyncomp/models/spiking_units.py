"""Convolutions with neurons behind them as data: which there are, the current into each, and what they cost."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float
from dyncomp.models.normed_conv import conv

SIDE = 3
"""Of every kernel but those that project."""

QUANTISER = 5
"""FLOPs of an activation of few bits: divided, rounded, bounded twice, multiplied."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """A convolution and its neurons.

    Attributes:
      inner, width: channels in and out.
      stride: of the convolution.
      side: (channels, stride) of what a residual block adds to the current, its input; None for nothing.
    """

    inner: int
    width: int
    stride: int = 1
    side: tuple[int, int] | None = None

    @property
    def projected(self) -> bool:
        """Whether what is added needs a convolution 1x1 to fit."""
        return self.side is not None and self.side != (self.width, 1)

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the neurons, from those of the input."""
        return -(-rows // self.stride), -(-columns // self.stride)

    def macs(self) -> int:
        """Multiply-adds of a neuron's current."""
        return SIDE * SIDE * self.inner + (self.side[0] if self.side and self.projected else 0)


def units_of(
    channels: int, widths: Sequence[int], convs: Sequence[int], residual: bool
) -> tuple[Unit, ...]:
    """The units of `SpikingClassifier` in order; every level but the first begins with stride 2.

    Raises:
      DyncompError: counts that do not fit the widths or each other.
    """
    if len(widths) != len(convs) or not widths or min(convs) < 1:
        raise DyncompError(f"widths={widths}, convs={convs}: give one count >= 1 for each width")
    if residual and any(count % 2 for count in convs):
        raise DyncompError(f"convs={convs}: a residual block has two convolutions")
    found = [Unit(channels, widths[0])] if residual else []
    inner = widths[0] if residual else channels
    for level, (width, count) in enumerate(zip(widths, convs, strict=True)):
        for index in range(count):
            stride = 2 if level and not index else 1
            side = (found[-1].inner, found[-1].stride) if residual and index % 2 else None
            found.append(Unit(inner, width, stride, side))
            inner = width
    return tuple(found)


def current(
    unit: Unit, weights: Mapping[str, Any], outs: Sequence[Array]
) -> Float[Array, "b _ _ o"]:
    """What flows into a unit's neurons, float32.

    Args:
      unit: which.
      weights: its own of `SpikingClassifier.folded`.
      outs: of all units so far; the last one is its input, the one before that what a residual block adds.
    """
    y = conv(outs[-1], weights["kernel"], unit.stride).astype(jnp.float32)
    y = y + weights["bias"][None, None, None]
    if unit.side is None:
        return y
    beside = conv(outs[-2], weights["side"], unit.side[1]) if unit.projected else outs[-2]
    return y + beside.astype(jnp.float32)


def read(spikes: Float[Array, "b _ _ d"], head: Float[Array, "d c"]) -> Float[Array, "b c"]:
    """Logits, float32: a linear map of the mean over places."""
    pooled = jnp.mean(spikes.astype(jnp.float32), axis=(1, 2))
    return jnp.matmul(pooled, head.astype(jnp.float32))


def prices(
    units: Sequence[Unit], rows: int, columns: int, classes: int, neuron: int, item: int
) -> dict[str, Any]:
    """Price of each event of one image.

    ``first``: the current of the image, which does not change. ``step``: all else of one step of time, every neuron
    whether it fires or not, with the rule. ``quantised``: the source network, once. ``spikes``: counted for each unit
    and priced 0; dense hardware computes on zeros alike, and what a spike costs elsewhere depends on the machine.

    Args:
      units: of the network.
      rows, columns: of the images.
      classes: c.
      neuron: FLOPs of a neuron and step.
      item: bytes of an activation.
    """
    currents, neurons = [], []
    for unit in units:
        before = rows * columns * unit.inner
        rows, columns = unit.grid(rows, columns)
        n = rows * columns * unit.width
        added = n if unit.side else 0
        currents.append(Cost(2 * n * unit.macs() + n + added, (before + n) * item))
        neurons.append(n)
    last, c, total = units[-1].width, classes, sum(neurons)
    head = Cost(neurons[-1] + 2 * last * c, neurons[-1] * item + 4 * c)
    # The rule: sums, softmax and its largest; a neuron reads and writes its membrane, and its spike is counted.
    each = Cost(total * (neuron + 1) + 7 * c, 8 * total)
    rest = sum(currents[1:], Cost(0))
    return {
        "first": currents[0],
        "step": rest + head + each,
        "quantised": currents[0] + rest + head + Cost(QUANTISER * total),
        "spikes": {f"unit_{i}": Cost(0) for i in range(len(units))},
    }


def neurons_of(units: Sequence[Unit], rows: int, columns: int) -> tuple[int, ...]:
    """How many neurons each unit has."""
    found = []
    for unit in units:
        rows, columns = unit.grid(rows, columns)
        found.append(rows * columns * unit.width)
    return tuple(found)
