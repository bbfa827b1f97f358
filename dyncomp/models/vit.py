"""A vision transformer (Dosovitskiy et al. 2021) whose stages can be called one by one."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dyncomp.core.aux import Aux, count, nest
from dyncomp.core.dtypes import DTypes, widened
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param
from dyncomp.core.typing import Array, Float
from dyncomp.models.block import ACTIVATION
from dyncomp.models.group import (
    Execution,
    Group,
    GroupStack,
    Remat,
    check_execution,
    first_below,
)
from dyncomp.models.norm import Norm, NormKind
from dyncomp_kernels._widths import sum_dtype

Pool = Literal["cls", "mean", "tokens"]


class PatchEmbed(nn.Module):
    """Cuts an image into patches, projects them, adds learned positions and perhaps a class token."""

    patch: int
    d_model: int
    class_token: bool
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, images: Float[Array | np.ndarray, "b h w _"]) -> Float[Array, "b t d"]:
        """Tokens in row-major patch order, the class token first."""
        rows = patches(images, self.patch).astype(self.dtypes.compute)
        b, t, width = rows.shape
        dtype, d, small = self.dtypes.param, self.d_model, nn.initializers.normal(0.02)
        lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
        kernel = param(self, "kernel", lecun, (width, d), (None, "embed"), dtype)
        bias = param(self, "bias", zeros, (d,), ("embed",), dtype)
        x = rows @ kernel.astype(rows.dtype) + bias.astype(rows.dtype)[None, None]
        if self.class_token:
            token = param(self, "cls", small, (d,), ("embed",), dtype).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token[None, None], (b, 1, d)), x], axis=1)
            t += 1
        place = param(self, "positions", small, (t, d), (None, "embed"), dtype)
        return constrain(x + place.astype(x.dtype)[None], ACTIVATION)


class Head(nn.Module):
    """Linear classifier; logits are float32 or more."""

    classes: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, features: Float[Array, "*n d"]) -> Float[Array, "*n c"]:
        """Class logits."""
        shape = (features.shape[-1], self.classes)
        zeros, lecun = nn.initializers.zeros_init(), nn.initializers.lecun_normal()
        kernel = param(self, "kernel", lecun, shape, ("embed", None), self.dtypes.param)
        bias = param(self, "bias", zeros, shape[1:], (None,), self.dtypes.param)
        wide = sum_dtype(features.dtype)
        logits = jnp.matmul(features, kernel.astype(features.dtype), preferred_element_type=wide)
        return logits + jnp.broadcast_to(bias.astype(wide), logits.shape)


class VisionTransformer(nn.Module):
    """Images to class logits.

    Attributes:
      classes: c.
      patch: side of a patch in pixels; divides height and width.
      d_model: d.
      groups: the stack of blocks (with a mixer that is not causal).
      layers: as in `DecoderLM`.
      pool: classify the class token, the mean of all tokens, or every token (dense prediction).
    """

    classes: int
    patch: int
    d_model: int
    groups: Sequence[Group]
    layers: Execution = "scan"
    remat: Remat = "none"
    pool: Pool = "cls"
    norm: NormKind = "layer"
    eps: float = 1e-6
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_execution(self.layers, self.remat)
        if self.pool not in ("cls", "mean", "tokens"):
            raise DyncompError(
                f"VisionTransformer.pool={self.pool!r}: use 'cls', 'mean' or 'tokens'"
            )
        self.groups = tuple(self.groups)
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.patches = PatchEmbed(self.patch, self.d_model, self.pool == "cls", self.dtypes)
        self.group = self._stacks()
        self.final_norm = Norm(self.norm, self.eps, self.dtypes)
        self.head = Head(self.classes, self.dtypes)

    def _stacks(self, **kwargs: Any) -> list[GroupStack]:
        return [
            GroupStack(group, self.layers, self.remat, self.dtypes, **kwargs)
            for group in self.groups
        ]

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b *t c"], Aux]:
        """Class logits, float32; [b t c], patches in row-major order, with ``pool="tokens"``.

        Args:
          images: float32, any scale the data set uses.
          mask: [b], 0 for examples that only fill up the batch.
          capture: "plan" for the plans of the parts, "hidden" for every block's output.
        """
        x, aux = self._run(images, mask, train, capture)
        return self.classify(x), aux

    def features(
        self,
        images: Float[Array | np.ndarray, "b h w _"],
        mask: Array | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "l b d"], Aux]:
        """Pooled, final-normed features after every block, in the order of execution (what exits look at).

        Raises:
          DyncompError: every token is classified.
        """
        if self.pool == "tokens":
            raise DyncompError("VisionTransformer.features needs pool='cls' or 'mean'")
        _, aux = self._run(images, mask, train, ("hidden",))
        stacked = []
        for index, stack in enumerate(self.group):
            blocks = [
                aux.plans[f"group_{index}"][f"block_{j}"]["hidden"]
                for j in range(len(stack.group.blocks))
            ]
            order = jnp.stack(blocks, axis=1)  # [repeat, period, b, t, d]
            stacked.append(order.reshape(-1, *order.shape[2:]))
        return self.pooled(jnp.concatenate(stacked)), dataclasses.replace(aux, plans={})

    def _run(self, images, mask, train, capture) -> tuple[Array, Aux]:
        x = self.patches(images)
        b, t = x.shape[:2]
        tokens = None if mask is None else jnp.broadcast_to(mask[:, None], (b, t))
        real = b if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
        seen = count(real, b)
        parts = {"embed": Aux(events={"images": seen})}
        below = first_below(self._stacks(parent=None), b, t)
        if "tokens" in below:
            raise DyncompError("images have no token ids to hash: use another router than Hash")
        for index, stack in enumerate(self.group):
            x, aux = stack(x, None, tokens, None, train, capture, below)
            below, parts[f"group_{index}"] = aux.below, dataclasses.replace(aux, below={})
        parts["head"] = Aux(events={"images": seen})
        return x, nest(**parts)

    def embed(self, images: Float[Array | np.ndarray, "b h w _"]) -> Float[Array, "b t d"]:
        """Patches to tokens: the first segment."""
        return self.patches(images)

    def run_block(self, index: int, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], Aux]:
        """Block ``index`` of all groups, alone: a middle segment. Needs ``layers="unroll"``."""
        for stack in self.group:
            if index < stack.depth:
                return stack.run(index, x)
            index -= stack.depth
        raise DyncompError(f"block {index} past the last of {self.depth}")

    def pooled(self, x: Float[Array, "*n t d"]) -> Float[Array, "*m d"]:
        """The final norm, then the class token, the mean over tokens, or all of them."""
        if self.pool == "tokens":
            return self.final_norm(x)
        if self.pool == "cls":
            return self.final_norm(x[..., 0, :])
        return jnp.mean(widened(self.final_norm(x)), axis=-2).astype(x.dtype)

    def classify(self, x: Float[Array, "b t d"]) -> Float[Array, "b *t c"]:
        """Pool, normalise, classify: the last segment."""
        return self.head(self.pooled(x))

    @property
    def depth(self) -> int:
        """Blocks in total."""
        return sum(group.repeat * len(group.blocks) for group in self.groups)

    def length(self, inputs_shape: tuple[int, ...]) -> int:
        """Tokens of an image of shape [b h w c]."""
        _, h, w, _ = inputs_shape
        return (h // self.patch) * (w // self.patch) + (self.pool == "cls")

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices of all events for images [b h w c]."""
        _, h, w, c = inputs_shape
        d, t, item = self.d_model, self.length(inputs_shape), self.dtypes.compute_itemsize
        groups = {
            f"group_{index}": stack.cost(d, t)
            for index, stack in enumerate(self._stacks(parent=None))
        }
        embed = Cost(
            2 * (h // self.patch) * (w // self.patch) * self.patch**2 * c * d, h * w * c * 4
        )
        head = Cost(2 * d * self.classes, d * item + self.classes * 4)
        head = head * t if self.pool == "tokens" else head
        return {"embed": {"images": embed}, **groups, "head": {"images": head}}


def patches(images: Float[Array | np.ndarray, "b h w _"], patch: int) -> Float[Array, "b t m"]:
    """Non-overlapping patches in row-major order, each flattened to m = patch * patch * c values.

    Raises:
      DyncompError: the patch does not divide the image.
    """
    b, h, w, c = images.shape
    if h % patch or w % patch:
        raise DyncompError(f"patch={patch} does not divide an image of {h}x{w}; choose a divisor")
    grid = jnp.asarray(images).reshape(b, h // patch, patch, w // patch, patch, c)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)
