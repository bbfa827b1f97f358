"""A convolutional network of residual blocks, each of which an image may pass by: gates decide, image by image."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count
from dyncomp.core.choose import straight_through
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Bool, Float
from dyncomp.models.conv_net import Conv, ConvUnits
from dyncomp.models.norm import NormKind
from dyncomp.models.vit import Head

Train = Literal["soft", "straight_through"]


@dataclasses.dataclass(frozen=True)
class GatedLevel:
    """Blocks of one resolution.

    Attributes:
      width: channels.
      blocks: how many, each with a gate.
    """

    width: int
    blocks: int


class Gates(nn.Module):
    """A gate for every block of a level: mean over places, d -> hidden, ReLU, one logit. Open at first.

    SkipNet's gate of a pooled, fully connected layer (arXiv 1711.09485); float32.

    Attributes:
      blocks: k.
      hidden: width of the layer between.
      open_bias: logit at first, nearly.
    """

    blocks: int
    hidden: int = 16
    open_bias: float = 2.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"], first: int = 0) -> Float[Array, "b m"]:
        """Logits of the gates from ``first`` on."""
        d, k, lecun = x.shape[-1], self.blocks, nn.initializers.lecun_normal(batch_axis=(0,))
        one = param(self, "one", lecun, (k, d, self.hidden), (None, "embed", None), "float32")
        two = param(self, "two", lecun, (k, self.hidden, 1), (None, None, None), "float32")
        start = nn.initializers.constant(self.open_bias)
        bias = param(self, "bias", start, (k,), (None,), "float32")
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        inner = jax.nn.relu(jnp.einsum("bd,kdh->bkh", pooled, one[first:]))
        return jnp.einsum("bkh,kh->bk", inner, two[first:, :, 0]) + bias[None, first:]

    def cost(self, d_model: int, gates: int) -> Cost:
        """Some gates for one example, without the mean."""
        return Cost(2 * gates * (d_model + 1) * self.hidden)


class Place(NamedTuple):
    """What a segment does: ``kind`` "begin", "block" or "down", in level ``level``; ``next`` block comes after it."""

    kind: str
    level: int
    next: int


class SkippingClassifier(nn.Module):
    """Residual blocks that images pass by where a gate says so (SkipNet, arXiv 1711.09485, feed-forward gates).

    x becomes g F(x) + (1 - g) x, F a residual block (`ConvUnits`), and its gate reads the x that arrives. Passing by
    changes nothing, so the gates of all blocks that are left in a level can be asked at once, and the first open one
    is where the image goes next: a decision among several targets (`targets`), one segment a block that runs. Between
    levels a residual block halves the grid; it always runs. Parameters: ``stem``, ``level_i_block_j``,
    ``level_i_gates``, ``down_i``, ``head``. Control: ``thresholds``, one a segment, that a gate's logit must exceed.

    Training runs all blocks; g is then the gate's probability ("soft"), or 0 or 1 with the probability's gradient
    ("straight_through"). The paper goes on with REINFORCE; we do not. The loss ``open`` is the mean share of the
    blocks' work that gates ask for.

    Attributes:
      classes: c.
      levels: from fine to coarse.
      stride: of the stem's convolution.
      train_gates: see above.
      gate_hidden: see `Gates`.
      norm: of every convolution, see `Conv`.
    """

    classes: int
    levels: Sequence[GatedLevel]
    stride: int = 1
    train_gates: Train = "straight_through"
    gate_hidden: int = 16
    norm: NormKind | None = "layer"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        self.levels = tuple(self.levels)
        if not self.levels or min(level.blocks for level in self.levels) < 1:
            raise DyncompError("SkippingClassifier.levels: give at least one level of one block")
        if self.train_gates not in ("soft", "straight_through"):
            raise DyncompError(
                f"train_gates={self.train_gates!r}: use 'soft' or 'straight_through'"
            )
        super().__post_init__()

    def setup(self):  # noqa: D102
        levels = list(enumerate(self.levels))
        own = {"norm": self.norm, "dtypes": self.dtypes}
        self.stem = Conv(self.levels[0].width, stride=self.stride, **own)
        self.blocks = [
            [self._block(i, name=f"level_{i}_block_{j}") for j in range(level.blocks)]
            for i, level in levels
        ]
        self.gates = [
            Gates(level.blocks, self.gate_hidden, name=f"level_{i}_gates") for i, level in levels
        ]
        self.down = [self._down(i) for i, _ in levels[1:]]
        self.head = Head(self.classes, self.dtypes)

    def _block(self, level: int, **kwargs: Any) -> ConvUnits:
        width = self.levels[level].width
        return ConvUnits((width,), "residual", norm=self.norm, dtypes=self.dtypes, **kwargs)

    def _down(self, level: int, **kwargs: Any) -> ConvUnits:
        width, own = self.levels[level].width, {"norm": self.norm, "dtypes": self.dtypes}
        return ConvUnits((width,), "residual", "stride", **own, **kwargs)

    def places(self) -> list[Place]:
        """The segments in order."""
        found = []
        for number, level in enumerate(self.levels):
            found.append(Place("down" if number else "begin", number, 0))
            found += [Place("block", number, n + 1) for n in range(level.blocks)]
        return found

    def targets(self, index: int) -> tuple[str, ...]:
        """Where an image may go after a segment: a block that is left in the level, or the next level, or the end."""
        place = self.places()[index]
        left = self.levels[place.level].blocks - place.next
        past = index + left + 1
        ends = "end" if past == len(self.places()) else f"segment_{past}"
        return (*(f"segment_{index + 1 + n}" for n in range(left)), ends)

    @nn.compact  # the only method with controls: segments get their threshold as an argument
    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b c"], Aux]:
        """Class logits, float32; all blocks run for all images (masked execution).

        Args:
          images: any scale the data set uses.
          mask: [b], 0 for examples that only fill up the batch.
          train: gates act as ``train_gates`` says.
          capture: "plan" gives ``opened`` bool [b k], which blocks each image runs, and the gates' ``logits`` [b k].
        """
        b = images.shape[0]
        real = jnp.ones((b,), bool) if mask is None else mask.astype(bool)
        start = lambda: jnp.zeros((len(self.places()),), jnp.float32)
        taus = jnp.asarray(self.variable("controls", "thresholds", start).value)
        x, shares, ran, logits = self._stem(images), [], [jnp.ones((b,), bool)], []
        tau = jnp.full((b,), taus[0])
        for number, blocks in enumerate(self.blocks):
            if number:
                x = self.down[number - 1](x)
                tau = jnp.full((b,), taus[len(ran)])
                ran.append(jnp.ones((b,), bool))
            for n, block in enumerate(blocks):
                logit = self.gates[number](x, n)[:, 0]
                opened, share = logit > tau, jax.nn.sigmoid(logit)
                shares.append(share)
                logits.append(logit)
                tau = jnp.where(opened, taus[len(ran)], tau)
                ran.append(opened)
                x = self._passed(x, block(x), opened, share, train)
        places = self.places()
        opened = jnp.stack([own for own, at in zip(ran, places, strict=True) if at.next], axis=1)
        asked = jnp.sum(jnp.stack(shares, axis=1) * self._shares(images.shape)[None], axis=1)
        losses = {"open": jnp.sum(asked * real) / jnp.maximum(jnp.sum(real), 1)}
        once = jnp.ones((b,), jnp.int32)
        events = {f"segment_{n}": count(own & real, once) for n, own in enumerate(ran)}
        plans = {"opened": opened, "logits": jnp.stack(logits, axis=1)}
        return self._read(x), Aux(losses, events, plans if "plan" in capture else {})

    def _passed(self, x: Array, y: Array, opened: Array, share: Array, train: bool) -> Array:
        """Block output ``y`` or its input ``x``, as gates say."""
        places = lambda own: own[:, None, None, None]
        if not train:
            return jnp.where(places(opened), y, x)
        hard = opened.astype(jnp.float32)
        gate = share if self.train_gates == "soft" else straight_through(hard, share)
        return x + places(gate).astype(x.dtype) * (y - x)

    def _stem(self, images: Float[Array | np.ndarray, "b h w _"]) -> Array:
        return jax.nn.relu(self.stem(jnp.asarray(images).astype(self.dtypes.compute)))

    def _read(self, x: Float[Array, "b h w d"]) -> Float[Array, "b c"]:
        return self.head(jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype))

    def begin(self, images: Float[Array | np.ndarray, "b h w _"]) -> dict[str, Array]:
        """What is carried: the state of each level, zeros in those that are not reached yet."""
        x = self._stem(images)
        carry, (b, h, w, _) = {"level_0": x}, x.shape
        for number, level in enumerate(self.levels[1:], 1):
            h, w = -(-h // 2), -(-w // 2)
            carry[f"level_{number}"] = jnp.zeros((b, h, w, level.width), x.dtype)
        return carry

    def segment(
        self, index: int, carry: dict[str, Array], threshold: Float[Array, ""]
    ) -> tuple[dict[str, Array], Array, Array, Array]:
        """Runs a block or what leads to a level, then asks the gates that are left.

        Returns:
          (carry, logits [b c], zeros before the last level; route [b], the first open gate; score [b], of the gates
          that were asked until then, the logit that is nearest to the threshold).
        """
        place = self.places()[index]
        name = f"level_{place.level}"
        x = carry[name]
        if place.kind == "down":
            x = self.down[place.level - 1](carry[f"level_{place.level - 1}"])
        elif place.kind == "block":
            x = self.blocks[place.level][place.next - 1](x)
        if place.level == len(self.levels) - 1:
            output = self._read(x)
        else:
            output = jnp.zeros((x.shape[0], self.classes), jnp.float32)
        if place.next == self.levels[place.level].blocks:
            b = x.shape[0]
            return {**carry, name: x}, output, jnp.ones((b,), bool), jnp.full((b,), jnp.nan)
        logits = self.gates[place.level](x, place.next)
        route, score = first_open(logits, threshold)
        return {**carry, name: x}, output, route, score

    def weights_of(self, params: Any, index: int | None) -> Any:
        """The parameters that segment ``index`` uses; None: those of ``begin``."""
        if index is None:
            return {"stem": params["stem"]}
        place = self.places()[index]
        names = []
        if place.kind == "down":
            names.append(f"down_{place.level - 1}")
        if place.kind == "block":
            names.append(f"level_{place.level}_block_{place.next - 1}")
        if place.next < self.levels[place.level].blocks:
            names.append(f"level_{place.level}_gates")
        if place.level == len(self.levels) - 1:
            names.append("head")
        return {name: params[name] for name in names}

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment for one image [b h w c]: convolutions, the gates it asks, the head where it reads."""
        grids, prices, item = self._grids(inputs_shape), [], self.dtypes.compute_itemsize
        _, h, w, c = inputs_shape
        for place in self.places():
            rows, columns, width = grids[place.level]
            if place.kind == "begin":
                own = Cost(2 * rows * columns * 9 * c * width, 4 * h * w * c)
            elif place.kind == "down":
                own = self._down(place.level, parent=None).cost(*grids[place.level - 1])[0]
            else:
                own = self._block(place.level, parent=None).cost(*grids[place.level])[0]
            level = self.levels[place.level]
            gates = Gates(level.blocks, self.gate_hidden, parent=None)
            own = own + gates.cost(width, level.blocks - place.next)
            if place.level == len(self.levels) - 1:
                head = rows * columns * width + 2 * width * self.classes
                own = own + Cost(head, width * item + self.classes * 4)
            prices.append(own)
        return {f"segment_{index}": price for index, price in enumerate(prices)}

    def _grids(self, inputs_shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Rows, columns and channels of each level."""
        _, h, w, _ = inputs_shape
        h, w, found = -(-h // self.stride), -(-w // self.stride), []
        for level in self.levels:
            found.append((h, w, level.width))
            h, w = -(-h // 2), -(-w // 2)
        return found

    def _shares(self, inputs_shape: tuple[int, ...]) -> Float[Array, "k"]:
        """Each gated block's share of the work of all of them."""
        prices = self.cost(inputs_shape).values()
        flops = [p.flops for p, at in zip(prices, self.places(), strict=True) if at.next]
        return jnp.asarray(np.asarray(flops) / sum(flops), jnp.float32)


def first_open(
    logits: Float[Array, "b m"], threshold: Float[Array, ""]
) -> tuple[Any, Float[Array, "b"]]:
    """(int32 [b], the first gate above the threshold, m where none is; the asked logit nearest to the threshold).

    A logit that is not a number is not open, and is the score.
    """
    opened: Bool[Array, "b m"] = logits > threshold
    m = logits.shape[1]
    route = jnp.where(jnp.any(opened, axis=1), jnp.argmax(opened, axis=1), m).astype(jnp.int32)
    asked = jnp.arange(m)[None] <= route[:, None]
    distance = jnp.where(asked, jnp.abs(logits - threshold), jnp.inf)
    nearest = jnp.argmin(distance, axis=1)
    return route, jnp.take_along_axis(logits, nearest[:, None], axis=1)[:, 0]
