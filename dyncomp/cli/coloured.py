"""Generated text coloured by what produced each token, while it comes."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.decoding.generated import Tick
from dyncomp.decoding.text import Decodes, Transcript
from dyncomp.report.coloured import Key, html_page, terminal_legend, terminal_text


class ColouredTranscript(Transcript):
    """A transcript that knows what produced each token.

    Args:
      tokenizer, stop: as `Transcript`.
      rows: sequences.
      key: what the colours mean.
      place: of a step and a row, the token's place in the key.
      paint: print the text in colours as it comes; one row only.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        rows: int,
        stop: Sequence[str],
        key: Key,
        place: Callable[[Any, int], int],
        paint: bool,
    ):
        super().__init__(tokenizer, rows, stop, self._paint if paint else None)
        self.key, self.place = key, place
        self._values: list[list[int]] = [[] for _ in range(rows)]
        self._shown = 0

    def __call__(self, tick: Tick) -> np.ndarray:
        """Takes a step; see `Transcript`."""
        for row, values in enumerate(self._values):
            if tick.emitted[row]:
                values.append(self.place(tick, row))
        return super().__call__(tick)

    def labels(self, row: int) -> list[str]:
        """What produced each token of a row."""
        return [self.key.labels[value] for value in self._values[row]]

    def tokens(self, row: int) -> tuple[list[str], list[int]]:
        """(pieces of the row's text, their places in the key)."""
        pieces = self.streams[row].pieces
        return pieces, self._values[row][: len(pieces)]

    def print(self, row: int, start: int = 0, stop: int | None = None) -> None:
        """Prints characters ``start`` to ``stop`` of a row: in colours on a terminal that has them."""
        from rich.console import Console

        pieces, values = self.tokens(row)
        cut, at = [], 0
        for piece in pieces:
            cut.append(piece[max(start - at, 0) : None if stop is None else max(stop - at, 0)])
            at += len(piece)
        if not sys.stdout.isatty():
            print("".join(cut), end="", flush=True)  # rich would turn tabs into spaces
            return
        console = Console()
        console.print(terminal_text(cut, values, self.key), end="", soft_wrap=True)

    def legend(self) -> None:
        """One line on standard error."""
        from rich.console import Console

        values = [value for row in range(len(self.streams)) for value in self.tokens(row)[1]]
        Console(stderr=True).print(terminal_legend(values, self.key), soft_wrap=True)

    def write_html(self, path: str, title: str, prompt: str, notes: Sequence[str]) -> None:
        """Writes the page of the first row."""
        pieces, values = self.tokens(0)
        page = html_page(title, [prompt, *pieces], [None, *values], self.key, notes)
        Path(path).write_text(page, encoding="utf-8")

    def _paint(self, row: int, new: str) -> None:
        begin, self._shown = self._shown, self._shown + len(new)
        self.print(row, begin, self._shown)
