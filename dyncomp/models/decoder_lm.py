"""A decoder-only language model (the Llama layout: RMSNorm, RoPE, grouped-query attention, gated FFN)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dyncomp.core.aux import Aux, count, nest
from dyncomp.core.dtypes import DTypes
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Cost
from dyncomp.core.sharding import constrain, param, parts
from dyncomp.core.typing import Array, Float, Int
from dyncomp.models.block import ACTIVATION
from dyncomp.models.group import (
    Execution,
    Group,
    GroupStack,
    Remat,
    check_execution,
    first_below,
    first_handed,
)
from dyncomp.models.norm import Norm, NormKind
from dyncomp_kernels._widths import sum_dtype
from dyncomp_kernels.dense_matmul.api import dense_matmul


class DecoderLM(nn.Module):
    """Tokens to next-token logits; what a block does is decided at its seams.

    Attributes:
      vocab_size: v.
      d_model: d.
      groups: the stack of blocks.
      layers: scan the blocks (fast to compile) or give each its own weights (fast to decode); same numbers. Apply
        with `dyncomp.models.apply`, which converts the stored, stacked parameters.
      remat: recompute a period's activations in the backward pass: all, or all but matrix products.
      tie_embeddings: use the embedding as output projection.
      norm: kind of the final norm.
      learned_positions: rows of a table of position embeddings that is added to the tokens' (GPT-2); None for no table.
        Past its end a position's embedding is NaN.
      max_length: refuse longer inputs; None for no limit.
    """

    vocab_size: int
    d_model: int
    groups: Sequence[Group]
    layers: Execution = "scan"
    remat: Remat = "none"
    tie_embeddings: bool = False
    norm: NormKind = "rms"
    eps: float = 1e-6
    learned_positions: int | None = None
    max_length: int | None = None
    dtypes: DTypes = DTypes()

    def __post_init__(self):
        check_execution(self.layers, self.remat)
        self.groups = tuple(self.groups)
        super().__post_init__()

    def setup(self):  # noqa: D102
        shape, axes, dtype = (self.vocab_size, self.d_model), ("vocab", "embed"), self.dtypes.param
        self.embedding = param(self, "embed", nn.initializers.normal(0.02), shape, axes, dtype)
        if self.learned_positions is not None:
            rows, small = (self.learned_positions, self.d_model), nn.initializers.normal(0.02)
            self.places = param(self, "positions", small, rows, (None, "embed"), dtype)
        self.group = self._stacks()
        self.final_norm = Norm(self.norm, self.eps, self.dtypes)
        if not self.tie_embeddings:
            lecun = nn.initializers.lecun_normal()
            self.head = param(self, "head", lecun, shape[::-1], axes[::-1], dtype)

    def _stacks(self, **kwargs: Any) -> list[GroupStack]:
        return [
            GroupStack(group, self.layers, self.remat, self.dtypes, **kwargs)
            for group in self.groups
        ]

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Array | None = None,
        positions: Int[Array, "#b t"] | None = None,
        cache: Any = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t v"], Aux]:
        """Next-token logits, float32.

        Args:
          tokens: int32; values in [0, v).
          mask: [b t], 1 for real tokens.
          positions: for RoPE or the table of positions; default the place in the sequence.
          cache: from `init_cache` or a previous call's ``Aux.cache``; tokens then continue it (prefill or decode).
          capture: "plan" for the plans of the parts, "hidden" for every block's output.
        """
        x, aux = self.hidden(tokens, mask, positions, cache, train, capture)
        return self.classify(x), aux

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        mask: Array | None = None,
        positions: Int[Array, "#b t"] | None = None,
        cache: Any = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """What `classify` reads: the last block's output, and all side results; arguments as in a call."""
        self._check_length(tokens.shape[1])
        x = self.embed(tokens, self._places(tokens, positions, cache))
        needed = tokens.size if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
        seen = count(needed, tokens.size)
        parts = {"embed": Aux(events={"tokens": seen})}
        below = {**self._below(tokens), **first_handed(cache, self.layers == "scan")}
        for index, stack in enumerate(self.group):
            name = f"group_{index}"
            own = None if cache is None else cache[name]
            x, aux = stack(x, positions, mask, own, train, capture, below)
            below, parts[name] = aux.below, dataclasses.replace(aux, below={})
        parts["head"] = Aux(events={"tokens": seen})
        return x, nest(**parts)

    def embed(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"] | None = None,
        vectors: Float[Array, "#b t d"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Embedded tokens: what the first block reads. ``positions`` matter with ``learned_positions`` only.

        Args:
          vectors: used instead of an embedding where a token is below 0 (trained prompts).

        Raises:
          DyncompError: the model has learned positions and none are given.
        """
        own = tokens if vectors is None else jnp.maximum(tokens, 0)
        table = jnp.asarray(self.embedding)
        if tokens.shape[1] > 1 and parts("batch", "seq") > 1:
            # Else XLA collects the looked-up rows of all positions.
            table = constrain(table.astype(self.dtypes.compute), ("vocab", None))
        x = jnp.take(table, own, axis=0).astype(self.dtypes.compute)
        if vectors is not None:
            x = jnp.where((tokens < 0)[:, :, None], vectors.astype(x.dtype), x)
        if self.learned_positions is not None:
            if positions is None:
                raise DyncompError("a model with learned positions embeds tokens at positions=...")
            x = x + jnp.take(self.places, positions, axis=0).astype(x.dtype)
        return constrain(x, ACTIVATION)

    def _places(self, tokens: Array, positions: Array | None, cache: Any) -> Array | None:
        """Positions for `embed`: given, or the place in the sequence, which continues the cache."""
        if self.learned_positions is None or positions is not None:
            return positions
        filled = [] if cache is None else jax.tree.leaves(cache, is_leaf=_has_length)
        start = jnp.ravel(filled[0].length)[0] if filled else jnp.int32(0)
        return (start + jnp.arange(tokens.shape[1], dtype=jnp.int32))[None, :]

    def run_block(
        self,
        index: int,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"] | None = None,
        mask: Array | None = None,
        cache: Any = None,
        visible: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Aux]:
        """Block ``index`` of all groups, alone, with its own cache (`layout.layer_caches`).

        ``visible`` goes to the block's mixer (`Attention`). Needs ``layers="unroll"`` and unstacked variables.

        Raises:
          DyncompError: there is no such block, the layers are scanned, or routers hand something up the depth.
        """
        if first_below(self._stacks(parent=None), 1, 1):
            raise DyncompError(
                "routers that hand scores up the depth need the whole stack of blocks"
            )
        told = {} if visible is None else {"visible": visible}
        for stack in self.group:
            if index < stack.depth:
                return stack.run(index, x, positions, mask, cache, **told)
            index -= stack.depth
        raise DyncompError(f"block {index} past the last of {self.depth}")

    @property
    def depth(self) -> int:
        """Blocks in total."""
        return sum(group.repeat * len(group.blocks) for group in self.groups)

    def classify(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Final norm and output projection; logits are float32 or more."""
        x = self.final_norm(x)
        tied = self.tie_embeddings
        head = (self.embedding.T if tied else self.head).astype(x.dtype)
        wide = sum_dtype(x.dtype)
        logits = dense_matmul(x, head, transposed=True if tied else None, dtype=wide)
        return constrain(logits, ("batch", "seq", "vocab"))

    def _below(self, tokens: Int[Array, "b t"]) -> dict[str, Array]:
        """What the first block finds handed up: token ids where a router wants them, zeros for the rest."""
        found = first_below(self._stacks(parent=None), *tokens.shape)
        return {**found, "tokens": tokens} if "tokens" in found else found

    def _check_length(self, length: int) -> None:
        for name in ("max_length", "learned_positions"):
            limit = getattr(self, name)
            if limit is not None and length > limit:
                raise DyncompError(
                    f"{length} tokens but DecoderLM.{name}={limit}; cut the input or raise it"
                )

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        """An empty cache for ``batch`` sequences of up to ``max_length`` tokens, in the layout of ``layers``."""
        return {
            f"group_{index}": stack.init_cache(self.d_model, batch, max_length)
            for index, stack in enumerate(self._stacks(parent=None))
        }

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """Prices of all events for inputs [b t]."""
        d, item = self.d_model, self.dtypes.compute_itemsize
        groups = {
            f"group_{index}": stack.cost(d, inputs_shape[1])
            for index, stack in enumerate(self._stacks(parent=None))
        }
        head = Cost(2 * d * self.vocab_size, d * item + self.vocab_size * 4)
        moved = 2 + (self.learned_positions is not None)
        return {"embed": {"tokens": Cost(0, moved * d * item)}, **groups, "head": {"tokens": head}}


def _has_length(node: Any) -> bool:
    """Whether a node of a model's cache is one layer's, which knows how far it is filled."""
    return hasattr(node, "length")
