"""One model reading along with a text, driven from the host."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.core.ledger import Ledger
from dyncomp.core.typing import Array, Float, Int, Variables
from dyncomp.decoding.batch import bucket, capped
from dyncomp.decoding.net import Net, separate
from dyncomp.decoding.reading import Reading, begin, check_rows, newest, read, unread
from dyncomp.decoding.written import position_limit
from dyncomp.models import DecoderLM

WIDTHS = (1, 2, 4, 8, 16, 24, 32, 48)
"""Tokens of one call that are compiled for; above, the buckets of prompts."""


def width(tokens: int, limit: int | None = None) -> int:
    """The smallest compiled width that holds ``tokens``; ``limit`` where that is smaller and holds them too."""
    size = next((size for size in WIDTHS if tokens <= size), 0)
    return capped(size or bucket(tokens), tokens, limit)


class Account:
    """A ledger whose events are fetched late, so that counting does not wait for the device."""

    def __init__(self, costs: Mapping[str, Any] | None = None, patience: int = 64):
        self._ledger, self._waiting, self._patience = Ledger(costs or {}), [], patience

    def add(self, events: Any) -> None:
        """Adds events, on the device still."""
        self._waiting.append(events)
        if len(self._waiting) >= self._patience:
            self.settle()

    def settle(self) -> Ledger:
        """The ledger of all that was added."""
        for events in jax.device_get(self._waiting):
            self._ledger.record(events)
        self._waiting = []
        return self._ledger


class Session:
    """Drives `reading.read` for one model: one program for each number of rows, of tokens and of slots.

    Args:
      model, variables: as stored (stacked, or separate already).

    Attributes:
      read: int64 [b], tokens of each row that the model has read; on the host.
    """

    def __init__(self, model: DecoderLM, variables: Variables):
        self.model, self.variables = separate(model, variables)
        self.read, self.slots, self.capacity = np.zeros(0, np.int64), 0, 0
        self._reading: Any = None
        self._last = np.zeros(0, np.int64)
        self._prompts, self._steps = Account(), Account()
        self._extend = jax.jit(self._extended, static_argnums=(4,), donate_argnums=(1,))
        self._back = jax.jit(unread, donate_argnums=(0,))

    @property
    def ledger(self) -> Ledger:
        """FLOPs since `open`, without the prompts'."""
        return self._steps.settle()

    @property
    def prompt_ledger(self) -> Ledger:
        """FLOPs of the prompts."""
        return self._prompts.settle()

    def open(self, prompts: Sequence[Sequence[int]], capacity: int) -> Float[Array, "b v"]:
        """Starts afresh with ``prompts``, which may be empty; logits after each, float32.

        Raises:
          DyncompError: an id outside the vocabulary, or prompts that the cache or the model does not hold.
        """
        check_rows(self.model, len(prompts))
        costs = self.model.cost((1, 1))
        self._prompts, self._steps = Account(costs), Account(costs)
        self.read, self._last = np.zeros((2, len(prompts)), np.int64)
        self.slots, self.capacity = 0, capacity
        self._reading = begin(self.model, len(prompts), capacity)
        return self._forward(prompts, True, self._prompts)[:, 0]

    def extend(self, tokens: Sequence[Sequence[int]]) -> Float[Array, "b t v"]:
        """Reads some tokens of each row: logits after every one, float32; what pads short rows means nothing.

        Raises:
          DyncompError: see `open`.
        """
        return self._forward(tokens, False, self._steps)[:, : max(map(len, tokens))]

    def step(self, tokens: Sequence[Sequence[int]]) -> Float[Array, "b v"]:
        """Like `extend`, but only the logits after each row's last token."""
        return self._forward(tokens, True, self._steps)[:, 0]

    def take_back(self, tokens: Sequence[int]) -> None:
        """Forgets so many of the newest tokens of each row, of those that the last call read.

        Raises:
          DyncompError: more than that.
        """
        drop = np.asarray(tokens, np.int64)
        if np.any(drop < 0) or np.any(drop > self._last):
            raise DyncompError(
                f"take_back: {drop.tolist()} of {self._last.tolist()} tokens that the last call read"
            )
        start, before = self.slots - int(self._last.max()), self.read - self._last
        kept = self._last - drop
        asked = np.int32(start), before.astype(np.int32), kept.astype(np.int32)
        self._reading = self._back(self._reading, *asked)
        self.read, self.slots, self._last = before + kept, start + int(kept.max()), kept

    def _forward(self, rows: Sequence[Sequence[int]], last: bool, account: Account) -> Array:
        tokens, counts = pad_right(rows, self.model.vocab_size, position_limit(self.model))
        self._check(len(rows), tokens.shape[1], counts)
        now = self.variables, self._reading, tokens, counts
        logits, self._reading, events = self._extend(*now, last)
        account.add(events)
        self.read, self._last = self.read + counts, counts.astype(np.int64)
        self.slots += int(counts.max())
        return logits

    def _check(self, rows: int, wide: int, counts: np.ndarray) -> None:
        limit = position_limit(self.model)
        if rows != len(self.read):
            raise DyncompError(f"{rows} rows for a session of {len(self.read)}; open it first")
        if self.slots + wide > self.capacity:
            raise DyncompError(
                f"{wide} slots on top of {self.slots} exceed a cache of {self.capacity}; raise capacity"
            )
        if limit is not None and np.max(self.read + counts) > limit:
            raise DyncompError(f"the model reads at most {limit} tokens; cut the prompt")

    def _extended(self, variables, reading: Reading, tokens, counts, last: bool) -> Any:
        net = Net(self.model, variables)
        x, after, events = read(net, reading, tokens, counts)
        return net.classify(newest(x, counts) if last else x), after, events


def pad_right(
    rows: Sequence[Sequence[int]], vocab_size: int, limit: int | None = None
) -> tuple[Int[np.ndarray, "b t"], Int[np.ndarray, "b"]]:
    """Token ids int32 in a compiled width, and how many are real.

    Args:
      limit: most tokens that the model reads, padding included.

    Raises:
      DyncompError: no row, or an id outside the vocabulary.
    """
    if not rows:
        raise DyncompError("give at least one row of tokens")
    counts = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), width(int(counts.max()), limit)), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DyncompError(
            f"token id {wrong} is not in a vocabulary of {vocab_size}; use the model's tokenizer"
        )
    return tokens, counts
