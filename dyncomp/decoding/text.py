"""Tokens to text while they come: whole characters only, and strings that end a sequence."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dyncomp.decoding.generated import Tick

PARTIAL = "\N{REPLACEMENT CHARACTER}"


@runtime_checkable
class Decodes(Protocol):
    """What turns ids into text."""

    def decode(self, ids: Any) -> str:
        """The text of some ids."""
        ...


@dataclasses.dataclass
class TextStream:
    """The text of one growing sequence.

    Attributes:
      tokenizer: decodes ids.
      stop: the first of these that appears ends the text, itself left out.
      text: all of it so far, but for a character whose bytes are not all there.
      stopped: a stop string has appeared.
      ends: where the text of each token ends; a character belongs to the token that brings its last byte.
    """

    tokenizer: Decodes
    stop: Sequence[str] = ()
    text: str = ""
    stopped: bool = False
    ends: list[int] = dataclasses.field(default_factory=list)
    _ids: list[int] = dataclasses.field(default_factory=list)
    _shown: int = 0

    def push(self, token: int) -> str:
        """Adds a token; returns text that is new and certain: what may begin a stop string is held back."""
        if self.stopped:
            return ""
        self._ids.append(int(token))
        whole = self.tokenizer.decode(self._ids)
        if whole.endswith(PARTIAL):
            self.ends.append(len(self.text))
            return ""
        found = [at for at in map(whole.find, self.stop) if at >= 0]
        self.stopped = bool(found)
        self.text = whole[: min(found)] if found else whole
        self.ends.append(len(self.text))
        return self._show(len(self.text) if found else len(whole) - self._begun(whole))

    def finish(self) -> str:
        """The text that was held back; no token comes any more."""
        return self._show(len(self.text))

    @property
    def pieces(self) -> list[str]:
        """The text, one piece for each token pushed before the stop: empty where it completes no character."""
        # A stop string may take text back from tokens that were there before it.
        ends = [min(end, len(self.text)) for end in self.ends]
        return [self.text[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def _show(self, end: int) -> str:
        new = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return new

    def _begun(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        sizes = (n for s in self.stop for n in range(len(s) - 1, 0, -1) if text.endswith(s[:n]))
        return max(sizes, default=0)


def token_pieces(tokenizer: Decodes, tokens: Sequence[int]) -> list[str]:
    """The text of each token in its context (`TextStream.pieces`): joined, the text without a torn last character."""
    stream = TextStream(tokenizer)
    for token in tokens:
        stream.push(token)
    return stream.pieces


class Transcript:
    """A listener of `Generator.generate`: the texts of all rows, and which rows a stop string ends.

    Args:
      tokenizer: decodes ids.
      rows: sequences.
      stop: strings that end a row.
      show: called with (row, new text) as it comes.
    """

    def __init__(self, tokenizer: Decodes, rows: int, stop: Sequence[str] = (), show: Any = None):
        self.streams = [TextStream(tokenizer, stop) for _ in range(rows)]
        self.show = show

    def __call__(self, tick: Tick) -> np.ndarray:
        """Takes a step; bool [b], rows whose text has ended."""
        for row, stream in enumerate(self.streams):
            if tick.emitted[row]:
                new = stream.push(int(tick.tokens[row]))
                if new and self.show:
                    self.show(row, new)
        return np.array([stream.stopped for stream in self.streams])

    def finish(self) -> None:
        """Shows what was held back."""
        for row, stream in enumerate(self.streams):
            rest = stream.finish()
            if rest and self.show:
                self.show(row, rest)

    @property
    def texts(self) -> list[str]:
        """What each row says."""
        return [stream.text for stream in self.streams]
