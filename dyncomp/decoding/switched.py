"""Two models take turns in writing one text; each reads what the other wrote when its turn comes (arXiv 2502.06833).

Every model keeps a cache of its own, of a prefix of the text. On its turn it reads all that it has missed in one pass,
so what is saved are sequential steps of the large model, not FLOPs: those are in the ledgers, catch-up included.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Array, Float, Int, Variables
from dyncomp.decoding.batch import bucket
from dyncomp.decoding.entropy import entropy_bits
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.decoding.session import WIDTHS, Session, width
from dyncomp.decoding.switching import LARGE, EntropySwitch, SwitchState
from dyncomp.decoding.trace import parameter_share
from dyncomp.decoding.written import (
    Writer,
    Written,
    WrittenTick,
    check_lengths,
    check_vocabularies,
)
from dyncomp.models import DecoderLM

BY_ENTROPY = EntropySwitch()


@runtime_checkable
class Switch(Protocol):
    """Who runs next; `EntropySwitch`, `RandomSwitch`, `PeriodicSwitch`."""

    def init(self, batch: int, key: Any = None) -> SwitchState:
        """Before the first token."""
        ...

    def step(
        self, state: SwitchState, entropy: Float[Array, "b"], threshold: Float[Array, "*_"]
    ) -> tuple[SwitchState, Int[Array, "b"]]:
        """After each token."""
        ...


@dataclasses.dataclass
class Switched(Written):
    """What came out.

    Attributes:
      models: who wrote each step's token, 0 the small and 1 the large model; an ending token's step included.
      entropies: bits, of the model that ran.
      read: tokens that it read in the step: 1, or more to catch up.
    """

    models: list[int] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    read: list[int] = dataclasses.field(default_factory=list)

    def large_share(self) -> float:
        """f_L: the large model's share of the steps."""
        return float(np.mean(self.models))


@dataclasses.dataclass(frozen=True)
class SwitchedTick(WrittenTick):
    """A step, and who wrote it.

    Attributes:
      model: int32 [1], 0 the small and 1 the large model.
    """

    model: Any = None


class SwitchingGenerator:
    """Generates with a small and a large model of one vocabulary, one sequence at a time.

    Rows of a batch would choose different models at the same step, and a compiled step runs one: a batch would either
    run both for all, and save nothing, or move rows between caches.

    Args:
      small, large: (model, variables) as stored.
      switch: who runs next.
      sampler: how a token is drawn; the switch sees raw logits.
      eos: tokens that end a sequence.

    Attributes:
      sessions: of the small and the large model; ``sessions[i].ledger`` holds its work in the last call.

    Raises:
      DyncompError: the vocabularies differ in size; `pretrained.check_pair` compares the tokenizers too.
    """

    def __init__(
        self,
        small: tuple[DecoderLM, Variables],
        large: tuple[DecoderLM, Variables],
        switch: Switch = BY_ENTROPY,
        sampler: Sampler = GREEDY,
        eos: Sequence[int] = (),
    ):
        check_vocabularies(small=small[0], large=large[0])
        self.sessions = Session(*small), Session(*large)
        self.switch, self.sampler, self.eos = switch, sampler, tuple(eos)
        self._decide = jax.jit(self._decided)

    @property
    def ledgers(self) -> tuple[Ledger, Ledger]:
        """FLOPs of the small and the large model in the last call, without the prompt's."""
        return self.sessions[0].ledger, self.sessions[1].ledger

    def cost_share(self, one: Switched) -> float:
        """The paper's metric: parameters times tokens, relative to the large model alone; no catch-up counted."""
        small, large = (
            sum(leaf.size for leaf in jax.tree.leaves(session.variables["params"]))
            for session in self.sessions
        )
        return parameter_share(np.asarray(one.models), small, large)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        listener: Callable[[SwitchedTick], Any] | None = None,
        threshold: float = 0.0,
        seed: int = 0,
    ) -> list[Switched]:
        """Writes at most ``max_new`` tokens after the prompt; ``listener`` as of `written.Writer.finish`.

        Raises:
          DyncompError: as `stream`.
        """
        writer = Writer([Switched()], max_new, self.eos)
        return writer.finish(self._ticks(writer, prompts, threshold, seed), listener)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        threshold: float = 0.0,
        seed: int = 0,
    ) -> Iterator[SwitchedTick]:
        """Yields each token as it is drawn, and who wrote it.

        Both models read the prompt but for its last token first, in parallel passes.

        Args:
          prompts: one.
          threshold: bits, for `EntropySwitch`; a run-time argument.

        Raises:
          DyncompError: several prompts, an empty one, or more than a model takes.
        """
        return self._ticks(Writer([Switched()], max_new, self.eos), prompts, threshold, seed)

    def _ticks(
        self,
        writer: Writer[Switched],
        prompts: Sequence[Sequence[int]],
        threshold: float,
        seed: int,
    ) -> Iterator[SwitchedTick]:
        for tick in writer.ticks(self._steps(writer, prompts, threshold, seed)):
            yield SwitchedTick(**vars(tick), model=np.array(writer.rows[0].models[-1:], np.int32))

    def _steps(
        self,
        writer: Writer[Switched],
        prompts: Sequence[Sequence[int]],
        threshold: float,
        seed: int,
    ) -> Iterator[list[list[int]]]:
        """The next token, step by step."""
        if len(prompts) != 1:
            raise DyncompError(
                f"{len(prompts)} prompts: rows of a batch would need different models at one step; give one"
            )
        (one,), max_new = writer.rows, int(writer.room[0])
        for session in self.sessions:
            check_lengths(session.model, prompts, max_new)
        text = list(prompts[0])
        margin = max(WIDTHS[-1], width(max_new))
        for session in self.sessions:
            session.open([text[:-1]], bucket(width(len(text)) + max_new + margin))
        keys = jax.random.split(jax.random.key(seed))
        state = self.switch.init(1, keys[0])
        model = int(state.model[0])
        while not writer.done[0]:
            gap = text[self.sessions[model].read[0] :]
            logits = self.sessions[model].step([gap])
            asked = np.float32(threshold), keys[1], np.int32(len(one.models))
            state, told = self._decide(logits, state, *asked)
            token, entropy, chosen = (leaf.item() for leaf in jax.device_get(told))
            one.models.append(model)
            one.entropies.append(entropy)
            one.read.append(len(gap))
            text.append(token)
            yield [[token]]
            model = chosen

    def _decided(
        self, logits: Float[Array, "b v"], state: SwitchState, threshold, key, step
    ) -> Any:
        """Draws the token and asks the switch, which sees the raw logits."""
        entropy = entropy_bits(logits)
        token = self.sampler(jax.random.fold_in(key, step), logits)
        state, model = self.switch.step(state, entropy, jnp.asarray(threshold))
        return state, (token, entropy, model)


def choose_on_text(
    switch: Switch,
    small: Float[Array, "b t"],
    large: Float[Array, "b t"],
    threshold: Float[Array, ""],
    key: Any = None,
) -> Int[Array, "b t"]:
    """Who would run each step of given texts: 0 the small, 1 the large model, int32.

    Args:
      small: entropies in bits of the small model after each prefix; the switch only ever sees those of who runs.
      large: of the large model.
      threshold: bits.
      key: for switches that draw.
    """

    def step(state: SwitchState, entropies: Array) -> tuple[SwitchState, Array]:
        now = state.model
        seen = jnp.where(now == LARGE, entropies[1], entropies[0])
        return switch.step(state, seen, threshold)[0], now

    both = jnp.moveaxis(jnp.stack([small, large]), 2, 0)  # [t 2 b]
    return jax.lax.scan(step, switch.init(small.shape[0], key), both)[1].T
