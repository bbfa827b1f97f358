"""A language model and its weights as pure functions of arrays, the way the decode loop wants them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from dyncomp.core.aux import Aux
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Float, Int, Variables
from dyncomp.decoding import packing
from dyncomp.models import DecoderLM, is_stacked, join_blocks, unstack


@dataclasses.dataclass(frozen=True)
class Net:
    """``model`` with its blocks separate, applied to given variables; make it inside the function that is compiled.

    Attributes:
      model: with ``layers="unroll"``.
      variables: unstacked, and packed where that is faster (`separate`).
    """

    model: DecoderLM
    variables: Variables

    def _apply(self, method: str, *args: Any) -> Any:
        with packing.told(self.variables["params"]) as params:
            return self.model.apply({**self.variables, "params": params}, *args, method=method)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        mask: Array | None,
        cache: Any,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The last block's output and all side results."""
        args = tokens, mask, positions, cache, False, capture
        return self._apply("hidden", *args)

    def embed(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "#b t"] | None = None,
        vectors: Float[Array, "#b t d"] | None = None,
    ) -> Float[Array, "b t d"]:
        """What the first block reads; ``vectors`` stand for tokens below 0 (`DecoderLM.embed`)."""
        return self._apply("embed", tokens, positions, vectors)

    def block(
        self,
        index: int,
        x: Float[Array, "b t d"],
        positions: Array,
        mask: Array | None,
        cache: Any,
        visible: Array | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, dict[str, Any]]:
        """Block ``index`` alone: its output, its extended cache and its events."""
        args = index, x, positions, mask, cache, visible
        y, aux = self._apply("run_block", *args)
        return y, aux.cache, aux.events

    def classify(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Final norm and output projection: float32 logits."""
        return self._apply("classify", x)


def separate(model: DecoderLM, variables: Variables) -> tuple[DecoderLM, Variables]:
    """The model with its layers unrolled, and its variables unstacked and without metadata, once.

    Raises:
      DyncompError: ``model`` is no `DecoderLM`.
    """
    if not isinstance(model, DecoderLM):
        raise DyncompError(f"decoding needs a models.DecoderLM, not {type(model).__name__}")
    own = nn.meta.unbox(variables)
    if is_stacked(own):
        own = jax.jit(unstack)(own)
    if packing.worthwhile():
        own = {**own, "params": jax.jit(packing.pack)(own["params"])}
    return model.clone(layers="unroll"), own


def gather_events(net: Net, found: Sequence[tuple[int, Any]]) -> dict[str, Any]:
    """Events of single blocks, ``(index, events)``, as the whole model would nest them."""
    parts = [(index, Aux(events=events)) for index, events in found]
    return dict(join_blocks(net.model.groups, parts).events)
