"""A language model whose generated tokens run fewer blocks than its prompt, trained the way it decodes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dyncomp.core.aux import Aux, count, nest
from dyncomp.core.errors import DyncompError
from dyncomp.core.typing import Array, Factory, Float, Int, check_factory
from dyncomp.depth import Layers, Spacing, check_layers, layer_set, path_similarity
from dyncomp.models.decoder_lm import DecoderLM
from dyncomp.models.layout import layer_caches
from dyncomp.models.single_blocks import join_blocks


class SkippingLM(nn.Module):
    """Two passes over ``prompt | response`` (Unified Layer Skipping, arXiv 2404.06954, fine-tuning).

    1. The first ``prefix`` tokens run all blocks, causally; their keys and values stay, and gradients reach them.
    2. The others run the kept blocks only, each over its own block's keys and values of the prompt and of the response
       so far, at positions ``prefix``, ``prefix + 1``, ...; a skipped block passes its input on.

    These are the blocks and caches of `decoding.KeepLayers`: teacher-forced logits are those of cached decoding. The
    first response token is predicted from the prompt's last state, which is of full depth. The split is static, one
    for the batch (the released code trains one example at a time for the same reason).

    Parameters are the backbone's own, at the same paths. Events lie under ``prompt`` and ``response`` (and ``whole``).
    If all blocks are kept the two passes are one, the dense network's, and all events are the response's.

    Attributes:
      backbone: factory of a `DecoderLM`; it runs with separate weights a block. Routers that hand something up the
        depth are refused.
      prefix: prompt tokens p; 0 for none.
      spacing, speedup, seed: which blocks are kept, see `depth.layer_set`.
      kept: the blocks themselves, in the place of the rule.
      prompt_layers: "kept" runs the prompt through the kept blocks too: that is pruning, the method's baseline.
      prompt_gradient: False cuts the gradient at the prompt's keys, values and last state.
      whole: also run the response through all blocks, for the two terms that the released code leaves at 0: the output
        then has ``emitted`` and ``final``, and the loss ``path_similarity`` is reported.
    """

    backbone: Factory
    prefix: int
    spacing: Spacing = "even"
    speedup: int | float = 1
    seed: int = 0
    kept: Sequence[int] | None = None
    prompt_layers: Literal["all", "kept"] = "all"
    prompt_gradient: bool = True
    whole: bool = False

    def __post_init__(self):
        check_factory(self.backbone, "SkippingLM.backbone")
        if self.prompt_layers not in ("all", "kept"):
            raise DyncompError(
                f"SkippingLM.prompt_layers={self.prompt_layers!r}: use 'all' or 'kept'"
            )
        if self.prefix < 0:
            raise DyncompError(f"SkippingLM.prefix={self.prefix}: use 0 or more prompt tokens")
        super().__post_init__()

    def setup(self):  # noqa: D102
        self.net = self.backbone(layers="unroll")
        nn.share_scope(self, self.net)

    @property
    def layers(self) -> str:
        """How the backbone runs its blocks; `layout.apply` reads it."""
        return "unroll"

    def template(self) -> DecoderLM:
        """The backbone without variables: what `decoding.Generator` runs, and its static properties."""
        return self.backbone(layers="unroll", parent=None)

    def kept_layers(self) -> Layers:
        """Indices of the kept blocks.

        Raises:
          DyncompError: fewer than 2 blocks, or blocks that do not exist.
        """
        depth = self.template().depth
        if self.kept is not None:
            return check_layers(self.kept, depth)
        return layer_set(self.spacing, depth, self.speedup, seed=self.seed)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        mask: Array | None = None,
        positions: Int[Array, "#b t"] | None = None,
        train: bool = False,
        capture: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "b r v"] | dict[str, Array], Aux]:
        """Next-token logits, float32, from the prompt's last position on: r = t - p + 1 (t for an empty prompt).

        Args:
          tokens: int32, prompt and response.
          mask: [b t], 1 for real tokens; prompts of several lengths are padded on the left.
          positions: for RoPE, where prompts are padded; default the place in the sequence.
          train: dense blocks do the same in both modes.
          capture: "plan" gives ``depth`` int32 [t], the blocks that each position runs.

        Raises:
          DyncompError: the input has no response.
        """
        t = tokens.shape[1]
        if self.is_initializing():
            return self.net(tokens)
        if t <= self.prefix:
            raise DyncompError(
                f"SkippingLM.prefix={self.prefix} leaves no response of {t} tokens; lower it"
            )
        whole = _Part(tokens, mask, positions)
        if self._one_pass():
            logits, aux = self.net(*whole)
            output, aux = logits[:, max(self.prefix - 1, 0) :], nest(response=aux)
        else:
            output, aux = self._two_passes(
                whole.columns(stop=self.prefix), whole.columns(self.prefix)
            )
        if "plan" in capture:
            read = self.net.depth if self.prompt_layers == "all" else len(self.kept_layers())
            depth = [read] * self.prefix + [len(self.kept_layers())] * (t - self.prefix)
            aux = dataclasses.replace(aux, plans={"depth": jnp.asarray(depth, jnp.int32)})
        return output, aux

    def _two_passes(self, prompt: "_Part", response: "_Part") -> tuple[Any, Aux]:
        kept, everything = self.kept_layers(), tuple(range(self.net.depth))
        b, length = response.tokens.shape[0], self.prefix + response.tokens.shape[1]
        caches, state, found = layer_caches(self.net.init_cache(b, length)), [], {}
        if self.prefix:
            first = kept if self.prompt_layers == "kept" else everything
            ran = self._through(first, prompt, caches, heads=1)
            state, caches, found["prompt"] = [ran.outputs[-1][:, -1:]], ran.caches, ran.aux
            if not self.prompt_gradient:
                state, caches = lax.stop_gradient((state, caches))
        read = lambda x: self.net.classify(jnp.concatenate([*state, x], axis=1))
        ran = self._through(kept, response, caches)
        output, found["response"] = read(ran.outputs[-1]), ran.aux
        if not self.whole:
            return output, nest(**found)
        full = self._through(everything, response, caches)
        same = jnp.stack(ran.outputs), jnp.stack([full.outputs[index] for index in kept])
        losses = {"path_similarity": path_similarity(*same, response.mask)}
        found["whole"] = dataclasses.replace(full.aux, losses={**full.aux.losses, **losses})
        return {"emitted": output, "final": read(full.outputs[-1])}, nest(**found)

    def _one_pass(self) -> bool:
        """Whether this is the dense network: then it runs as one, with its bits."""
        everything = len(self.kept_layers()) == self.template().depth
        return everything and self.prompt_gradient and not self.whole

    def _through(
        self, layers: Layers, part: "_Part", caches: Sequence[Any], heads: int | None = None
    ) -> "_Ran":
        """Tokens through some blocks; the head reads ``heads`` of each sequence (default all)."""
        tokens, mask, positions = part
        caches, x = list(caches), self.net.embed(tokens, positions)
        found, outputs = [], []
        for index in layers:
            x, aux = self.net.run_block(index, x, positions, mask, caches[index])
            caches[index] = aux.cache
            found.append((index, aux))
            outputs.append(x)
        aux = join_blocks(self.net.groups, found)
        needed = tokens.size if mask is None else jnp.sum(mask.astype(bool), dtype=jnp.int32)
        seen = count(needed, tokens.size)
        read = seen if heads is None else count(heads * tokens.shape[0])
        events = {"embed": {"tokens": seen}, **aux.events, "head": {"tokens": read}}
        return _Ran(outputs, caches, dataclasses.replace(aux, events=events))

    def cost(self, inputs_shape: tuple[int, ...]) -> dict[str, Any]:
        """The backbone's prices, for each pass."""
        prices = self.template().cost(inputs_shape)
        names = [
            *(["prompt"] if self.prefix else []),
            "response",
            *(["whole"] if self.whole else []),
        ]
        return dict.fromkeys(names, prices)


class _Part(NamedTuple):
    """A stretch of the sequences."""

    tokens: Array
    mask: Array | None
    positions: Array | None

    def columns(self, start: int | None = None, stop: int | None = None) -> "_Part":
        """Some of its positions."""
        cut = lambda x: None if x is None else x[:, start:stop]
        return _Part(self.tokens[:, start:stop], cut(self.mask), cut(self.positions))


class _Ran(NamedTuple):
    """Every block's output, all caches, side results."""

    outputs: list[Array]
    caches: list[Any]
    aux: Aux
