"""The text that a driver writes on the host, row by row, several tokens at a time."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dyncomp.core.errors import DyncompError
from dyncomp.decoding.generated import Reason
from dyncomp.models import DecoderLM


@dataclasses.dataclass
class Written:
    """What came out of one prompt.

    Attributes:
      tokens: without the prompt and without the token that ended it.
      reason: "eos", or "length": as many as were asked for.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    reason: Reason = "length"


class Writer:
    """Collects tokens until each row has ended.

    Args:
      rows: what is written into, one a prompt.
      max_new: tokens of each row at most.
      eos: tokens that end a row.

    Attributes:
      done: bool [b].
      room: int [b], tokens that may still come.
    """

    def __init__(self, rows: Sequence[Written], max_new: int, eos: Sequence[int]):
        self.rows, self.eos = rows, frozenset(eos)
        self.done = np.zeros(len(rows), bool)
        self.room = np.full(len(rows), max_new)

    def add(self, row: int, tokens: Sequence[int]) -> int:
        """Writes up to the row's end; how many of the tokens count, an ending one included."""
        for place, token in enumerate(tokens):
            if self.done[row]:
                return place
            if token in self.eos:
                self.rows[row].reason, self.done[row] = "eos", True
            else:
                self.rows[row].tokens.append(int(token))
                self.room[row] -= 1
                self.done[row] = self.room[row] == 0
        return len(tokens)


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
