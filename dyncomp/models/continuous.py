"""Classifiers whose depth is solved for: a stem, a differential equation or a fixed point, a linear head."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import param
from dyncomp.core.typing import Array, Factory, Float, check_factory
from dyncomp.models.pyramid import HalvingConv
from dyncomp.models.vit import Head


class DenseStem(nn.Module):
    """Flattens images and projects them.

    Attributes:
      width: of the state.
    """

    width: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "b h w c"]) -> Float[Array, "b d"]:
        """The initial state."""
        rows = jnp.asarray(images).reshape(images.shape[0], -1).astype(self.dtypes.compute)
        init, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        shape = (rows.shape[1], self.width)
        kernel = param(self, "kernel", init, shape, (None, "embed"), self.dtypes.param)
        bias = param(self, "bias", zeros, shape[1:], ("embed",), self.dtypes.param)
        return rows @ kernel.astype(rows.dtype) + bias.astype(rows.dtype)[None]

    def shape(self, inputs_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of one state, for images [b h w c]."""
        return (self.width,)

    def cost(self, inputs_shape: tuple[int, ...]) -> Cost:
        """One image."""
        inner = math.prod(inputs_shape[1:])
        return Cost(2 * inner * self.width, 4 * inner + self.width * self.dtypes.compute_itemsize)


class ConvStem(nn.Module):
    """Convolutions 3x3 of stride 2 with norms: images to feature maps.

    Attributes:
      width: channels.
      halvings: how many convolutions.
    """

    width: int
    halvings: int = 2
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "b h w c"]) -> Float[Array, "b u v d"]:
        """The initial state, [b h/2^n w/2^n d]."""
        x = jnp.asarray(images).astype(self.dtypes.compute)
        for index in range(self.halvings):
            x = HalvingConv(self.width, dtypes=self.dtypes, name=f"conv_{index}")(x)
        return x

    def shape(self, inputs_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of one state, for images [b h w c]."""
        side = lambda size: -(-size // 2**self.halvings)
        return side(inputs_shape[1]), side(inputs_shape[2]), self.width

    def cost(self, inputs_shape: tuple[int, ...]) -> Cost:
        """One image: products of the convolutions (zeros around the map count), 8 FLOPs a value for norms."""
        _, h, w, inner = inputs_shape
        total, item = Cost(0), self.dtypes.compute_itemsize
        for _ in range(self.halvings):
            before, h, w = h * w * inner, -(-h // 2), -(-w // 2)
            moved = (before + h * w * self.width) * item
            total = total + Cost(h * w * self.width * (18 * inner + 8), moved)
            inner = self.width
        return total


class ContinuousClassifier(nn.Module):
    """Images to class logits through a block that is solved, not stacked (Kidger 2022, arXiv 2202.02435).

    Parameters: ``stem``, ``core``, ``head``. Controls: the core's ``tolerance``.

    Attributes:
      classes: c.
      core: factory of an `ODEBlock` or an `EquilibriumBlock`.
      stem: factory of what makes the initial state; has ``shape`` and ``cost``.
    """

    classes: int
    core: Factory
    stem: Factory
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_factory(self.core, "ContinuousClassifier.core")
        check_factory(self.stem, "ContinuousClassifier.stem")
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.embed = self.stem(name="stem", dtypes=self.dtypes)
        self.solve = self.core(name="core", dtypes=self.dtypes)
        self.head = Head(self.classes, self.dtypes)

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w c"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
        **start: Any,
    ) -> tuple[Float[Array, "b classes"], Aux]:
        """Class logits, float32.

        Args:
          images: as the data set scales them.
          mask: [b], 0 for examples that only fill up the batch.
          train: computes the core's penalties.
          capture: "plan" for what each example's solve took.
          start: ``start=z`` goes to an `EquilibriumBlock`.
        """
        z, aux = self.solve(self.embed(images), mask=mask, train=train, capture=capture, **start)
        b = images.shape[0]
        seen = {"images": count(b if mask is None else jnp.sum(mask.astype(bool)), b)}
        return self.classify(z), nest(stem=Aux(events=seen), core=aux, head=Aux(events=seen))

    def classify(self, z: Float[Array, "b *n d"]) -> Float[Array, "b classes"]:
        """Logits of solved states; maps are averaged."""
        return self.head(z.reshape(z.shape[0], -1, z.shape[-1]).mean(axis=1))

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices of all events for images [b h w c]."""
        stem = self.stem(dtypes=self.dtypes, parent=None)
        core = self.core(dtypes=self.dtypes, parent=None)
        shape = stem.shape(inputs_shape)
        d = core.widened(shape)[-1]
        head = Cost(2 * d * self.classes + math.prod(shape[:-1]) * d, 4 * (d + self.classes))
        return {
            "stem": {"images": stem.cost(inputs_shape)},
            "core": core.cost(shape),
            "head": {"images": head},
        }
