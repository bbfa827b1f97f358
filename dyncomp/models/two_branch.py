"""A CNN with a branch of latent tokens that carries the early classifiers (Dynamic Perceiver, arXiv 2306.11248)."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.typing import Array, Float
from dyncomp.models.batch_norm import BatchNorm
from dyncomp.models.bottlenecks import ConvLevel, ConvNorm, ConvStage, Size, pooled
from dyncomp.models.latent import (
    AttentionLayer,
    LatentTokens,
    ReadFeatures,
    TokenMixer,
    WriteFeatures,
)
from dyncomp.models.staged import StagedClassifier
from dyncomp.models.vit import Head

STAGES = 4
Reads = Literal["every", "first"]
FirstExit = Literal["latent", "features"]


class HandOn(nn.Module):
    """What an earlier classifier tells a later one: ReLU(BN(W logits)); the gradient flows into the logits.

    Attributes:
      width: of the features.
    """

    width: int
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, logits: Float[Array, "b c"], train: bool = False) -> Float[Array, "b d"]:
        """Features for the later classifier, of the compute dtype."""
        y = Head(self.width, self.dtypes, name="product")(logits.astype(self.dtypes.compute))
        y = y.astype(self.dtypes.compute)
        return jax.nn.relu(BatchNorm(dtypes=self.dtypes, name="norm")(y, train))


class MergeHead(nn.Module):
    """Batch norm and a linear classifier; with ``hidden`` a layer with hard swish and dropout between them.

    The released RegNet and ResNet have no hidden layer, its MobileNetV3 has one.

    Attributes:
      classes: c.
      hidden: width of the layer between; 0 for none.
      dropout: of the hidden layer, in training.
    """

    classes: int
    hidden: int = 0
    dropout: float = 0.2
    dtypes: DTypes = DTypes()

    @nn.compact
    def __call__(self, x: Float[Array, "b _"], train: bool = False) -> Float[Array, "b c"]:
        """Logits, float32."""
        x = BatchNorm(dtypes=self.dtypes, name="norm")(x, train)
        if self.hidden:
            x = Head(self.hidden, self.dtypes, name="middle")(x).astype(self.dtypes.compute)
            x = jax.nn.hard_swish(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Head(self.classes, self.dtypes, name="product")(x)

    def cost(self, width: int) -> Cost:
        """Price of one example."""
        if not self.hidden:
            return Cost(2 * width * self.classes)
        return Cost(2 * self.hidden * (width + self.classes))


class TwoBranchClassifier(StagedClassifier):
    """Images to four answers, of growing cost: two from the latent tokens, one from the CNN, one from both.

    Four stages. In each the tokens read the CNN's features (`ReadFeatures`) and think (self-attention), the CNN's
    blocks run, the tokens become half as many and as wide as the CNN's new features (`TokenMixer`), and these read the
    tokens (`WriteFeatures`). Exits, in order: tokens of stage 3, *before* the CNN's third stage runs; tokens of stage
    4, before its fourth; its pooled features; all together. Segments are cut there: who leaves first skips stage 3.

    Parameters: ``latent``, ``stem_conv``, ``stage_i``, ``read_i``, ``think_i_j``, ``mix_i``, ``write_i``, ``hand_i``,
    ``head_early``, ``head_latent``, ``head_features``, ``head_merge``; statistics of batch norms are controls.

    Attributes:
      classes: c.
      levels: the CNN's four stages.
      stem: width of the first convolution, 3x3 of stride 2.
      tokens: latent tokens of the first stage; halved after each. Their width is that of the features a stage gets.
      blocks: self-attention blocks of each stage (released code: 3, 3, 9, 3 times a depth factor).
      heads: of self-attention, by stage.
      widening: of the MLP in self-attention.
      side: of the grid of keys that tokens read.
      merge_hidden: see `MergeHead`.
      reads: ``first`` lets tokens read before stage 1 only (ablation).
      first_exit: ``features`` puts the first exit on the CNN's pooled features after stage 3, which then has to run.
    """

    classes: int
    levels: Sequence[ConvLevel]
    stem: int
    tokens: int = 128
    blocks: Sequence[int] = (3, 3, 9, 3)
    heads: Sequence[int] = (1, 2, 4, 8)
    widening: int = 4
    side: int = 7
    merge_hidden: int = 0
    reads: Reads = "every"
    first_exit: FirstExit = "latent"
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        self.levels, self.blocks = tuple(self.levels), tuple(self.blocks)
        self.heads = tuple(self.heads)
        if not len(self.levels) == len(self.blocks) == len(self.heads) == STAGES:
            raise DyncompError("TwoBranchClassifier: give four levels, blocks and heads")
        if self.tokens < 8 or self.tokens % 8:
            raise DyncompError(
                f"TwoBranchClassifier.tokens={self.tokens}: use a multiple of 8, it is halved three times"
            )
        if self.reads not in ("every", "first"):
            raise DyncompError(f"TwoBranchClassifier.reads={self.reads!r}: use 'every' or 'first'")
        if self.first_exit not in ("latent", "features"):
            raise DyncompError(
                f"TwoBranchClassifier.first_exit={self.first_exit!r}: use 'latent' or 'features'"
            )
        super().__post_init__()

    @property
    def depth(self) -> int:  # noqa: D102
        return 4

    @property
    def widths(self) -> tuple[int, ...]:
        """C_i, the channels that enter each stage, and those that leave the last."""
        return (self.stem, *(level.width for level in self.levels))

    def _token_count(self, stage: int) -> int:
        return self.tokens >> stage

    def _modules(self, **kwargs: Any) -> dict[str, Any]:
        """Everything with parameters; lists by stage."""
        widths = self.widths
        own: dict[str, Any] = {"dtypes": self.dtypes, **kwargs}
        reading = range(STAGES if self.reads == "every" else 1)
        think = lambda i: AttentionLayer(self.heads[i], 0, self.widening, **own)
        head = lambda: Head(self.classes, **own)
        return {
            "latent": LatentTokens(self.tokens, widths[0], **own),
            "stem_conv": ConvNorm(self.stem, 3, 2, **own),
            "stage": [ConvStage(level, **own) for level in self.levels],
            "read": [ReadFeatures(self.side, **own) for _ in reading],
            "think": [[think(i) for _ in range(self.blocks[i])] for i in range(STAGES)],
            "mix": [
                TokenMixer(self._token_count(i + 1), widths[i + 1], **own)
                for i in range(STAGES - 1)
            ],
            "write": [WriteFeatures(**own) for _ in range(STAGES)],
            "hand": [HandOn(widths[3], **own) for _ in range(2)],
            "head_early": head(),
            "head_latent": head(),
            "head_features": head(),
            "head_merge": MergeHead(self.classes, self.merge_hidden, **own),
        }

    def setup(self):  # noqa: D102
        for name, value in self._modules().items():
            setattr(self, name, value)

    # ---- the forward pass, in segments

    def _thought(self, stage: int, z: Array, x: Array) -> Array:
        """Tokens of a stage: what they read, and self-attention."""
        if stage < len(self.read):
            z = self.read[stage](z, x)
        for layer in self.think[stage]:
            z = layer(z)
        return z

    def start(self, images: Array, train: bool) -> dict[str, Any]:
        """Stages 1 and 2 and the tokens of stage 3.

        Returns:
          ``x``, ``mid``, ``out``: what enters CNN stage 3, leaves it, and leaves stage 4; ``z``, ``late``: tokens of
          stages 3 and 4; ``early_logits``, ``late_logits``: of the exits on them. Zeros until they are made.
        """
        x = self.stem_conv(images.astype(self.dtypes.compute), train)
        z = self.latent(x.shape[0])
        for stage in range(2):
            z = self._thought(stage, z, x)
            x = self.stage[stage](x, train)
            z = self.mix[stage](z)
            x = self.write[stage](x, z)
        b, size = x.shape[0], tuple(x.shape[1:])
        mid = self.levels[2].size(size)  # pyrefly: ignore[bad-argument-type]
        empty = lambda *shape: jnp.zeros((b, *shape), x.dtype)
        answers = jnp.zeros((b, self.classes), jnp.float32)
        return {
            "x": x, "mid": empty(*mid), "out": empty(*self.levels[3].size(mid)),
            "z": self._thought(2, z, x), "late": empty(self._token_count(3), self.widths[3]),
            "early_logits": answers, "late_logits": answers,
        }  # fmt: skip

    def step(
        self, index: int, carry: dict[str, Any], train: bool
    ) -> tuple[dict[str, Any], Float[Array, "b c"]]:
        """See `StagedClassifier.step`."""
        return (self._early, self._latent, self._features, self._merge)[index](dict(carry), train)

    def _early(self, carry: dict[str, Any], train: bool):
        if self.first_exit == "features":
            carry["mid"] = self.stage[2](carry["x"], train)
            logits = self.head_early(pooled(carry["mid"]))
        else:
            logits = self.head_early(token_mean(carry["z"]))
        return {**carry, "early_logits": logits}, logits

    def _latent(self, carry: dict[str, Any], train: bool):
        mid = carry["mid"]
        if self.first_exit == "latent":
            mid = self.stage[2](carry["x"], train)
        z = self.mix[2](carry["z"])
        mid = self.write[2](mid, z)
        late = self._thought(3, z, mid)
        told = self.hand[0](carry["early_logits"], train)
        logits = self.head_latent(jnp.concatenate([token_mean(late), told], axis=-1))
        return {**carry, "mid": mid, "late": late, "late_logits": logits}, logits

    def _features(self, carry: dict[str, Any], train: bool):
        out = self.stage[3](carry["mid"], train)
        return {**carry, "out": out}, self.head_features(pooled(out))

    def _merge(self, carry: dict[str, Any], train: bool):
        late, told = carry["late"], self.hand[1](carry["late_logits"], train)
        both = [pooled(self.write[3](carry["out"], late)), token_mean(late), told]
        return carry, self.head_merge(jnp.concatenate(both, axis=-1), train)

    def parts(self, index: int | None) -> tuple[str, ...]:
        """See `StagedClassifier.parts`."""
        third = () if self.first_exit == "latent" else ("stage_2",)
        return {
            None: (
                "latent", "stem_conv", "stage_0", "stage_1", "read_0", "read_1", "read_2",
                "think_0", "think_1", "think_2", "mix_0", "mix_1", "write_0", "write_1",
            ),
            0: ("head_early", *third),
            1: (
                *(() if third else ("stage_2",)), "mix_2", "write_2", "read_3", "think_3",
                "hand_0", "head_latent",
            ),
            2: ("stage_3", "head_features"),
            3: ("write_3", "hand_1", "head_merge"),
        }[index]  # fmt: skip

    # ---- what it costs

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Cost]:
        """Price of each segment; products, convolutions, pooling and means (norms and activations are not charged)."""
        made, widths, classes = self._modules(parent=None), self.widths, self.classes
        size: Size = (inputs_shape[1], inputs_shape[2], inputs_shape[3])
        stem = made["stem_conv"].cost(size)
        size = -(-size[0] // 2), -(-size[1] // 2), self.stem
        think, blocks, write = [], [], []
        for stage in range(STAGES):
            think.append(self._thought_cost(made, stage, size))
            blocks.append(made["stage"][stage].cost(size))
            size = self.levels[stage].size(size)
            inner = min(stage + 1, STAGES - 1)  # after the last stage its own tokens are read again
            write.append(made["write"][stage].cost(size, self._token_count(inner), widths[inner]))
        mix = [made["mix"][i].cost(self._token_count(i), widths[i]) for i in range(STAGES - 1)]
        mean = lambda stage: Cost(self._token_count(stage) * widths[stage])
        pool, out = Cost(size[0] * size[1] * size[2]), size[2]
        told = Cost(2 * classes * widths[3])
        early = mean(2) + Cost(2 * widths[2] * classes)
        if self.first_exit == "features":
            third = self.levels[2].width
            grid = self._size_after(2, inputs_shape)
            early = blocks[2] + Cost(grid[0] * grid[1] * third) + Cost(2 * third * classes)
            blocks[2] = Cost(0)
        begun = sum((blocks[i] + mix[i] + write[i] for i in range(2)), stem) + sum(
            think[:3], Cost(0)
        )
        latent = mean(3) + told + Cost(4 * widths[3] * classes)
        merge = write[3] + pool + told + made["head_merge"].cost(out + 2 * widths[3])
        return {
            "segment_0": begun + early,
            "segment_1": blocks[2] + mix[2] + write[2] + think[3] + latent,
            "segment_2": blocks[3] + pool + Cost(2 * out * classes),
            "segment_3": merge,
        }

    def _size_after(self, stage: int, inputs_shape: tuple[int, ...]) -> Size:
        size: Size = (-(-inputs_shape[1] // 2), -(-inputs_shape[2] // 2), self.stem)
        for level in self.levels[: stage + 1]:
            size = level.size(size)
        return size

    def _thought_cost(self, made: dict[str, Any], stage: int, size: Size) -> Cost:
        tokens, width = self._token_count(stage), self.widths[stage]
        layers = (layer.cost(tokens, width, tokens, width) for layer in made["think"][stage])
        total = sum(layers, Cost(0))
        if stage < len(made["read"]):
            total = total + made["read"][stage].cost(tokens, width, size)
        return total


def token_mean(z: Float[Array, "b t d"]) -> Float[Array, "b d"]:
    """The mean of the tokens, in float32; ``z.dtype``."""
    return jnp.mean(z.astype(jnp.float32), axis=1).astype(z.dtype)
