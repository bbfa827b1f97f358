"""Several tokens a step from one frozen model: prompt tokens guess, a tree of guesses is verified in the same pass.

Parallel prompt decoding (arXiv 2405.18628), with one embedding a prompt token (the paper's v = 1, of all its speed
results). A pass reads the newest token, candidates for what follows, and after each of them a chain of prompt tokens,
whose outputs are guesses for two, three, ... tokens ahead. Real tokens never see prompt tokens, and those never stay in
the cache, so greedy text is the model's own whatever the embeddings are. How many prompt tokens the last accepted node
carried says which tree comes next; one program serves all trees, padded to the largest.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from dyncomp.attention import keep_slots, truncate
from dyncomp.core.aux import count
from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Array, Bool, Float, Int, Variables
from dyncomp.decoding.batch import bucket
from dyncomp.decoding.branches import check_branches, read_branches
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.reading import Reading, begin, each_cache, newest, read
from dyncomp.decoding.sampling import GREEDY, Sampler
from dyncomp.decoding.session import Account, pad_right
from dyncomp.decoding.tree_accept import (
    TreeAcceptance,
    greedy_matches,
    longest_path,
    typical_matches,
)
from dyncomp.decoding.tree_states import TreeFamily
from dyncomp.decoding.tree_tables import TreeTables, stack_tables, tree_tables
from dyncomp.decoding.written import Writer, Written, WrittenTick, check_lengths, position_limit
from dyncomp.models import DecoderLM


@dataclasses.dataclass
class TreeWritten(Written):
    """What came out of one prompt.

    Attributes:
      accepted: candidates that each pass accepted; it writes one token more.
      depths: of the tree of each pass.
    """

    accepted: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)


@struct.dataclass
class Growing:
    """Between two passes; donated to the next.

    Attributes:
      reading: of all but the newest token.
      newest: int32 [b], root of the next tree.
      guesses: int32 [b k r], the best of each prompt token, first the likeliest.
      state: int32 [b], which tree comes next.
      step: int32 [].
    """

    reading: Reading
    newest: Int[Array, "b"]
    guesses: Int[Array, "b k r"]
    state: Int[Array, "b"]
    step: Int[Array, ""]


class TreeGenerator:
    """Generates with one frozen model, k trained prompt embeddings and a family of trees.

    Args:
      model, variables: as stored.
      prompts: [k d], prompt embeddings; prompt i guesses i + 2 tokens ahead.
      family: a tree for each number of prompts that an accepted node may carry (`tree_states.best_family`).
      sampler: greedy, which keeps the model's own text; or a temperature, with typical acceptance, which does not keep
        the distribution.
      eos: tokens that end a sequence.

    Attributes:
      prompt_ledger, ledger: FLOPs of the last call, of its prompts and of its passes. Needed is what the tree holds,
        prompt tokens included.

    Raises:
      DyncompError: embeddings that do not fit the model or the family, or a model with windows.
    """

    def __init__(
        self,
        model: DecoderLM,
        variables: Variables,
        prompts: Float[Array, "k d"],
        family: TreeFamily,
        sampler: Sampler = GREEDY,
        eos: Sequence[int] = (),
    ):
        k = len(family.trees)
        if prompts.shape != (k, model.d_model):
            raise DyncompError(
                f"prompts {prompts.shape} for {k} trees and a model of width {model.d_model}; give"
                f" [{k}, {model.d_model}]"
            )
        check_branches(model)
        self.model, self.variables = separate(model, variables)
        self.prompts, self.sampler, self.eos = jnp.asarray(prompts), sampler, tuple(eos)
        pairs = zip(family.trees, family.prompts, strict=True)
        self.tables = stack_tables([tree_tables(tree, own, k) for tree, own in pairs])
        self.ranks = 1 + int(np.max(self.tables.guess_rank))
        self._accounts = Account(), Account()
        self._start = jax.jit(self._started, static_argnums=(4,))
        self._pass = jax.jit(self._passed, donate_argnums=(2,))

    @property
    def prompt_ledger(self) -> Ledger:
        """FLOPs of the prompts."""
        return self._accounts[0].settle()

    @property
    def ledger(self) -> Ledger:
        """FLOPs of the passes."""
        return self._accounts[1].settle()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        *,
        listener: Callable[[WrittenTick], Any] | None = None,
        seed: int = 0,
    ) -> list[TreeWritten]:
        """Writes at most ``max_new`` tokens after each prompt; ``listener`` as of `written.Writer.finish`.

        Raises:
          DyncompError: as `stream`.
        """
        writer = Writer([TreeWritten() for _ in prompts], max_new, self.eos)
        return writer.finish(writer.ticks(self._passes(writer, prompts, seed)), listener)

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new: int, *, seed: int = 0
    ) -> Iterator[WrittenTick]:
        """Yields the tokens of each pass, a step for each place in it.

        Raises:
          DyncompError: an empty prompt, an id outside the vocabulary, or more than the model takes.
        """
        writer = Writer([TreeWritten() for _ in prompts], max_new, self.eos)
        return writer.ticks(self._passes(writer, prompts, seed))

    def _passes(
        self, writer: Writer[TreeWritten], prompts: Sequence[Sequence[int]], seed: int
    ) -> Iterator[list[list[int]]]:
        """The new tokens of each row, pass by pass."""
        rows, max_new = writer.rows, int(writer.room.max(initial=0))
        check_lengths(self.model, prompts, max_new)
        costs, key = self.model.cost((1, 1)), jax.random.key(seed)
        self._accounts = Account(costs), Account(costs)
        tokens, counts = pad_right(prompts, self.model.vocab_size, position_limit(self.model))
        weights = self.variables, self.prompts
        used = max_new * min(len(rows), self.tables.paths.shape[-1])
        capacity = bucket(tokens.shape[1] + used + self.tables.real.shape[-1])
        growing, events = self._start(weights, tokens, counts, key, capacity)
        self._accounts[0].add(events)
        yield [[token] for token in jax.device_get(growing.newest).tolist()]
        while not writer.done.all():
            growing, told, events = self._pass(weights, ~writer.done, growing, key)
            self._accounts[1].add(events)
            accepted, new, states = jax.device_get(told)
            fresh: list[list[int]] = [[] for _ in rows]
            for row in np.flatnonzero(~writer.done).tolist():
                rows[row].accepted.append(int(accepted[row]))
                rows[row].depths.append(int(states[row]) + 1)
                fresh[row] = new[row, : accepted[row] + 1].tolist()
            yield fresh

    def _started(self, weights, tokens, counts, key, capacity: int) -> Any:
        """Reads the prompts, draws the first tokens, and lets the prompt tokens guess what follows them."""
        net, b, k = Net(self.model, weights[0]), len(tokens), len(self.prompts)
        x, reading, events = read(net, begin(self.model, b, capacity), tokens, counts)
        token = self.sampler(jax.random.fold_in(key, 0), net.classify(newest(x, counts))[:, 0])
        chain = jnp.tril(jnp.ones((1, k, k), bool)), jnp.ones((b, k), bool), weights[1][None]
        blank, depth = jnp.full((b, k), -1, jnp.int32), jnp.arange(k, dtype=jnp.int32)[None]
        x, after, more = read_branches(net, reading, blank, depth, *chain)
        cache = each_cache(lambda cache: truncate(cache, reading.slots), after.cache)
        more = {**more, "head": {"tokens": count(b * k)}}
        events = jax.tree.map(jnp.add, events, more)
        state = jnp.full((b,), k - 1, jnp.int32)
        reading = Reading(cache, reading.read)
        return Growing(reading, token, self._guess(net, x), state, jnp.int32(1)), events

    def _passed(self, weights, going: Bool[Array, "b"], growing: Growing, key) -> Any:
        """One tree: verifies, compacts the accepted path, guesses anew."""
        net, before = Net(self.model, weights[0]), growing.reading
        tables = jax.tree.map(lambda leaf: jnp.asarray(leaf)[growing.state], self.tables)
        tokens = _fill(tables, growing)
        vectors = weights[1][jnp.maximum(tables.prompt, 0)]
        mask = tables.real & going[:, None]
        x, reading, events = read_branches(
            net, before, tokens, tables.depth, tables.mask, mask, vectors
        )
        nodes = tables.prompts.shape[-1]
        logits = net.classify(x[:, :nodes])
        found = self._accept(tokens[:, :nodes], logits, tables)
        rows = jnp.arange(len(tokens))
        own = self.sampler(jax.random.fold_in(key, growing.step), logits[rows, found.last])
        chain = tables.prompt_slots[rows, found.last]
        guesses = self._guess(net, x[rows[:, None], jnp.maximum(chain, 0)])
        slots = jnp.where(going[:, None], found.slots, -1)
        cache = each_cache(lambda cache: keep_slots(cache, before.slots, slots), reading.cache)
        read_now = before.read + jnp.where(going, found.accepted + 1, 0)
        state = tables.prompts[rows, found.last] - 1
        after = Growing(Reading(cache, read_now), own, guesses, state, growing.step + 1)
        heads = jnp.sum(going, dtype=jnp.int32) * chain.shape[1]
        heads += jnp.sum(mask[:, :nodes] & (tokens[:, :nodes] >= 0), dtype=jnp.int32)
        events = {
            **events,
            "head": {"tokens": count(heads, len(tokens) * (nodes + chain.shape[1]))},
        }
        return after, (found.accepted, _emitted(tokens, found, own), growing.state), events

    def _accept(
        self, tokens: Int[Array, "b m1"], logits: Float[Array, "b m1 v"], tables: Any
    ) -> TreeAcceptance:
        parent = tables.parent[:, : tokens.shape[1]]
        if self.sampler.temperature == 0:
            greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            matches = greedy_matches(tokens, greedy, parent) & (tokens >= 0)
        else:
            warm = self.sampler.temperature
            matches = typical_matches(tokens, logits, parent, temperature=warm)
        return longest_path(matches, tables.paths)

    def _guess(self, net: Net, x: Float[Array, "b k d"]) -> Int[Array, "b k r"]:
        """The best tokens of each prompt."""
        return lax.top_k(net.classify(x), self.ranks)[1].astype(jnp.int32)


def _fill(tables: TreeTables, growing: Growing) -> Int[Array, "b n"]:
    """Tokens of a tree's slots: the newest one at the root, guesses for candidates, -1 for prompts and padding."""
    rows = jnp.arange(len(growing.newest))[:, None]
    place = jnp.maximum(tables.guess_depth, 0), jnp.maximum(tables.guess_rank, 0)
    tokens = jnp.where(tables.guess_depth >= 0, growing.guesses[rows, *place], -1)
    return tokens.at[:, 0].set(growing.newest)


def _emitted(
    tokens: Int[Array, "b n"], found: TreeAcceptance, own: Int[Array, "b"]
) -> Int[Array, "b p"]:
    """The accepted candidates and the token after them, then -1."""
    path = jnp.pad(found.slots[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    candidates = jnp.take_along_axis(tokens, jnp.maximum(path, 0), axis=1)
    place = jnp.arange(path.shape[1])[None]
    end = found.accepted[:, None]
    return jnp.where(place < end, candidates, jnp.where(place == end, own[:, None], -1))
