"""The text that a driver writes on the host, row by row, several tokens at a time."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.decoding.generated import Reason, Tick
from dyncomp.models import DecoderLM


@dataclasses.dataclass
class Written:
    """What came out of one prompt.

    Attributes:
      tokens: without the prompt and without the token that ended it.
      reason: "eos"; "length", as many as were asked for; "stop", the listener ended it.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: Reason = "length"


@dataclasses.dataclass(frozen=True)
class WrittenTick(Tick):
    """A step of rows that got several tokens in one round; ``depths`` is 0.

    Attributes:
      guessed: bool [b], the token was a guess that the model agreed with: another one of its round follows.
    """

    guessed: Any = None


W = TypeVar("W", bound=Written)
T = TypeVar("T", bound=Tick)


class Writer(Generic[W]):
    """Writes what each round of a driver brings, a token of every row at a time, until each row has ended.

    Args:
      rows: what is written into, one a prompt.
      max_new: tokens of each row at most.
      eos: tokens that end a row.

    Attributes:
      done: bool [b].
      room: int [b], tokens that may still come.
    """

    def __init__(self, rows: list[W], max_new: int, eos: Sequence[int]):
        self.rows, self.eos = rows, frozenset(eos)
        self.done = np.zeros(len(rows), bool)
        self.room = np.full(len(rows), max_new)

    def ticks(self, rounds: Iterable[Sequence[Sequence[int]]]) -> Iterator[WrittenTick]:
        """The tokens of ``rounds``, of each row any number a round, as steps; the next round is asked for after them.

        Rows that end between two steps, by a token or by `stop`, get no more tokens of their round.
        """
        for fresh in rounds:
            for place in range(max(map(len, fresh))):
                open_rows = [
                    row for row, own in enumerate(fresh) if place < len(own) and not self.done[row]
                ]
                if open_rows:
                    guessed = np.array([place + 1 < len(own) for own in fresh])
                    yield self._step({row: int(fresh[row][place]) for row in open_rows}, guessed)

    def finish(self, ticks: Iterable[T], listener: Callable[[T], Any] | None = None) -> list[W]:
        """Takes all of ``ticks``; ``listener`` may return a bool [b] of rows that end, their last token included."""
        for tick in ticks:
            asked = listener(tick) if listener else None
            if asked is not None:
                self.stop(asked)
        return self.rows

    def stop(self, asked: np.ndarray) -> None:
        """Ends rows, bool [b], that have not ended."""
        for row in np.flatnonzero(np.asarray(asked) & ~self.done).tolist():
            self.rows[row].reason, self.done[row] = "stop", True

    def _step(self, fresh: dict[int, int], guessed: np.ndarray) -> WrittenTick:
        b = len(self.rows)
        tokens, emitted, ended = np.zeros(b, np.int32), np.zeros(b, bool), np.zeros(b, bool)
        for row, token in fresh.items():
            tokens[row], ended[row] = token, token in self.eos
            if ended[row]:
                self.rows[row].reason, self.done[row] = "eos", True
            else:
                emitted[row] = True
                self.rows[row].tokens.append(token)
                self.room[row] -= 1
                self.done[row] = self.room[row] == 0
        none = np.zeros(b, bool)
        depths = np.zeros(b, np.int32)
        return WrittenTick(tokens, emitted, depths, ended, none, guessed=guessed & emitted)


def check_lengths(model: DecoderLM, prompts: Sequence[Sequence[int]], max_new: int) -> None:
    """Refuses empty prompts, no tokens to write, and more than the model takes.

    Raises:
      DyncompError: names the fix.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise DyncompError("every prompt needs at least one token")
    if max_new < 1:
        raise DyncompError(f"max_new={max_new}: ask for at least one token")
    longest, limit = max(map(len, prompts)), position_limit(model)
    if limit is not None and longest + max_new > limit:
        raise DyncompError(
            f"{longest} tokens of prompt and {max_new} new ones exceed the model's {limit}; cut the prompt"
        )


def position_limit(*models: DecoderLM) -> int | None:
    """Most tokens that all of ``models`` read: their ``max_length`` and tables of positions; None for no limit."""
    limits = [limit for model in models for limit in (model.max_length, model.learned_positions)]
    return min((limit for limit in limits if limit is not None), default=None)


def check_vocabularies(**models: DecoderLM) -> None:
    """Refuses models that do not share a vocabulary; `pretrained.check_pair` also compares tokenizers.

    Raises:
      DyncompError: names the two that differ.
    """
    (first, one), *others = models.items()
    for name, other in others:
        if other.vocab_size != one.vocab_size:
            raise DyncompError(
                f"{first} has {one.vocab_size} logits and {name} {other.vocab_size}; use models of one family, with"
                " one tokenizer"
            )
