"""Speculative decoding: a drafter guesses some tokens, the target reads them all at once and keeps what it agrees with.

Greedy output is the target's own; sampled output has its distribution (arXiv 2211.17192, 2302.01318). One compiled
round drafts, verifies and takes back; the host only learns which tokens came out. Rows of a batch that keep fewer
tokens than others leave slots of the caches empty, so caches are larger than for one sequence.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Array, Float, Int, Variables
from dyncomp.decoding.batch import bucket
from dyncomp.decoding.drafting import Drafter, Request
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.reading import Reading, begin, check_rows, newest, read, unread
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.decoding.session import Account, pad_right
from dyncomp.decoding.speculation import accept_greedy, accept_sampled, next_window
from dyncomp.decoding.written import Writer, Written, WrittenTick, check_lengths, position_limit
from dyncomp.models import DecoderLM

WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of drafts that a round is compiled for."""


@dataclasses.dataclass
class Speculated(Written):
    """What came out of one prompt.

    Attributes:
      accepted: drafts that each round kept; a round writes one token more.
      drafted: drafts that each round made.
    """

    accepted: list[int] = dataclasses.field(default_factory=list)
    drafted: list[int] = dataclasses.field(default_factory=list)


@struct.dataclass
class Standing:
    """Between two rounds; donated to the next.

    Attributes:
      reading: the target's, of all but the newest token.
      newest: int32 [b].
      draft: the drafter's state.
      window: int32 [b], how many tokens to draft.
      round: int32 [].
    """

    reading: Reading
    newest: Int[Array, "b"]
    draft: Any
    window: Int[Array, "b"]
    round: Int[Array, ""]


class SpeculativeGenerator:
    """Generates with a target and a drafter.

    Args:
      model, variables: the target, as stored.
      drafter: see `drafting.Drafter`.
      sampler: how a token is drawn, by both.
      window: drafts of the first round.
      limit: drafts of a round at most, up to 16.
      adaptive: two more drafts after a round that kept all, else one fewer (`next_window`).
      eos: tokens that end a sequence.

    Attributes:
      prompt_ledger, ledger: FLOPs of the target in the last call, for its prompts and its rounds.
      draft_prompt_ledger, draft_ledger: of the drafter.

    Raises:
      DyncompError: another vocabulary, layers that do not exist, a window out of range.
    """

    def __init__(
        self,
        model: DecoderLM,
        variables: Variables,
        drafter: Drafter,
        sampler: Sampler = GREEDY,
        *,
        window: int = 4,
        limit: int = 8,
        adaptive: bool = True,
        eos: Sequence[int] = (),
    ):
        if not 1 <= window <= limit <= WINDOWS[-1]:
            raise DyncompError(
                f"window={window}, limit={limit}: use 1 <= window <= limit <= {WINDOWS[-1]}"
            )
        self.model, self.variables = separate(model, variables)
        drafter.check(self.model)
        self.drafter, self.sampler, self.eos = drafter, sampler, tuple(eos)
        self.window, self.limit, self.adaptive = window, limit, adaptive
        self._accounts = [Account() for _ in range(4)]
        self._start = jax.jit(self._started, static_argnums=(5,))
        self._round = jax.jit(self._rounded, static_argnums=(6,), donate_argnums=(2,))

    prompt_ledger: Ledger = property(lambda self: self._accounts[0].settle())  # type: ignore[assignment]
    ledger: Ledger = property(lambda self: self._accounts[1].settle())  # type: ignore[assignment]
    draft_prompt_ledger: Ledger = property(lambda self: self._accounts[2].settle())  # type: ignore[assignment]
    draft_ledger: Ledger = property(lambda self: self._accounts[3].settle())  # type: ignore[assignment]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        listener: Callable[[WrittenTick], Any] | None = None,
        seed: int = 0,
    ) -> list[Speculated]:
        """Writes at most ``max_new`` tokens after each prompt; ``listener`` as of `written.Writer.finish`.

        Raises:
          DyncompError: as `stream`.
        """
        writer = Writer([Speculated() for _ in prompts], max_new, self.eos)
        return writer.finish(writer.ticks(self._rounds(writer, prompts, seed)), listener)

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, seed: int = 0
    ) -> Iterator[WrittenTick]:
        """Yields the tokens of each round, a step for each place in it.

        Raises:
          DyncompError: an empty prompt, an id outside the vocabulary, or more than a model takes.
        """
        writer = Writer([Speculated() for _ in prompts], max_new, self.eos)
        return writer.ticks(self._rounds(writer, prompts, seed))

    def _rounds(
        self, writer: Writer[Speculated], prompts: Sequence[Sequence[int]], seed: int
    ) -> Iterator[list[list[int]]]:
        """The new tokens of each row, round by round."""
        max_new = int(writer.room.max(initial=0))
        readers = [self.model, *filter(None, [getattr(self.drafter, "model", None)])]
        for model in readers:
            check_lengths(model, prompts, max_new)
        check_rows(self.model, len(prompts))
        costs = self.model.cost((1, 1)), self.drafter.cost(self.model)
        self._accounts = [Account(costs[place // 2]) for place in range(4)]
        weights, key = self.drafter.weights(), jax.random.key(seed)
        tokens, counts = pad_right(prompts, self.model.vocab_size, position_limit(*readers))
        capacity = self._capacity(len(prompts), tokens.shape[1], max_new)
        standing, events = self._start(self.variables, weights, tokens, counts, key, capacity)
        self._count(events, 0)
        yield [[token] for token in jax.device_get(standing.newest).tolist()]
        windows = np.full(len(prompts), self.window)
        while not writer.done.all():
            ask = np.where(writer.done, 0, np.minimum(windows, writer.room - 1))
            k = next(size for size in WINDOWS if size >= max(ask.max(), 1))
            now = ask.astype(np.int32), ~writer.done
            standing, told, events = self._round(self.variables, weights, standing, *now, key, k)
            self._count(events, 1)
            accepted, tokens, windows = jax.device_get(told)
            fresh: list[list[int]] = [[] for _ in writer.rows]
            for row in np.flatnonzero(~writer.done).tolist():
                writer.rows[row].accepted.append(int(accepted[row]))
                writer.rows[row].drafted.append(int(ask[row]))
                fresh[row] = tokens[row, : accepted[row] + 1].tolist()
            yield fresh

    def _count(self, events: tuple[Any, Any], stage: int) -> None:
        for place, part in enumerate(events):
            if part is not None:
                self._accounts[2 * place + stage].add(part)

    def _capacity(self, rows: int, padded: int, max_new: int) -> int:
        """Slots: one sequence wastes none; in a batch a round may use as many as its luckiest row."""
        used = max_new * (1 if rows == 1 else min(2 * rows, self.limit + 2))
        return bucket(padded + used + WINDOWS[-1] + 2)

    def _started(self, variables, weights, tokens, counts, key, capacity: int) -> Any:
        """Reads the prompts and draws the first tokens."""
        net = Net(self.model, variables)
        x, reading, events = read(net, begin(self.model, len(tokens), capacity), tokens, counts)
        logits = net.classify(newest(x, counts))[:, 0]
        token = self.sampler(jax.random.fold_in(key, 0), logits)
        draft, own = self.drafter.start(weights, tokens, counts, token, capacity)
        window = jnp.full((len(tokens),), self.window, jnp.int32)
        return Standing(reading, token, draft, window, jnp.int32(1)), (events, own)

    def _rounded(self, variables, weights, standing: Standing, lengths, going, key, k: int) -> Any:
        """Drafts, verifies, keeps."""
        net, key = Net(self.model, variables), jax.random.fold_in(key, standing.round)
        request = Request(standing.reading, standing.newest, lengths, going, self._choose(key), k)
        drafted = self.drafter.draft(net, weights, standing.draft, request)
        tokens = jnp.concatenate([standing.newest[:, None], drafted.tokens], axis=1)
        counts = jnp.where(going, 1 + lengths, 0)
        x, reading, events = self.drafter.verify(net, drafted, tokens, counts)
        found = self._accept(key, drafted.tokens, lengths, drafted.proposed, net.classify(x))
        accepted = jnp.where(going, found.accepted, 0)
        own = jnp.take_along_axis(found.tokens, accepted[:, None], axis=1)[:, 0]
        before = standing.reading
        reading = unread(reading, before.slots, before.read, jnp.where(going, 1 + accepted, 0))
        draft = self.drafter.settle(standing.draft, request, drafted, accepted, own)
        window = standing.window
        if self.adaptive:
            window = next_window(window, accepted, lengths, limit=self.limit)
        after = Standing(reading, own, draft, window, standing.round + 1)
        return after, (accepted, found.tokens, window), (events, drafted.events)

    def _choose(self, key: Array) -> Any:
        """Draws a draft; its distribution is only kept where it is needed."""

        def choose(place: Array, logits: Float[Array, "b v"]) -> tuple[Int[Array, "b"], Any]:
            own = jax.random.fold_in(jax.random.fold_in(key, 1), place)
            greedy = self.sampler.temperature == 0
            return self.sampler(own, logits), None if greedy else self.sampler.probabilities(logits)

        return choose

    def _accept(self, key, drafts, lengths, proposed, logits: Float[Array, "b k1 v"]) -> Any:
        if self.sampler.temperature == 0:
            return accept_greedy(drafts, lengths, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        flat = logits.reshape(-1, logits.shape[-1])
        target = self.sampler.probabilities(flat).reshape(logits.shape)
        return accept_sampled(jax.random.fold_in(key, 2), drafts, lengths, proposed, target)
