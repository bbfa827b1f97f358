"""Prompts through the decode loop: as one batch, or each by itself."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Flops:
    """What was needed, in units of 1e9.

    Attributes:
      prompt, generated: of the prompts and of the tokens after them.
    """

    prompt: float = 0.0
    generated: float = 0.0


def generate_rows(
    generator: Any,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    transcript: Any,
    *,
    alone: bool,
    **options: Any,
) -> tuple[list[Any], Flops]:
    """Runs a driver of `decoding`; ``transcript`` hears of every row under its own number.

    Args:
      alone: one prompt after the other, as if each were the only one: for policies whose rows wait for one another.
      options: of its ``generate``.
    """
    rows, flops, found = len(prompts), Flops(), []
    runs = [slice(row, row + 1) for row in range(rows)] if alone else [slice(0, rows)]
    for run in runs:
        listener = _only(transcript, run, rows)
        found += generator.generate(prompts[run], max_new, listener=listener, **options)
        for stage, ledger in _ledgers(generator):
            setattr(flops, stage, getattr(flops, stage) + ledger.total("needed") / 1e9)
    return found, flops


def _ledgers(generator: Any) -> list[tuple[str, Any]]:
    """(field of `Flops`, ledger) of all models that took part in the last call."""
    parts = getattr(generator, "sessions", [generator])
    found = [("prompt", part.prompt_ledger) for part in parts]
    found += [("generated", part.ledger) for part in parts]
    if hasattr(generator, "draft_ledger"):
        drafts = generator.draft_prompt_ledger, generator.draft_ledger
        found += zip(("prompt", "generated"), drafts, strict=True)
    return found


def _only(transcript: Any, run: slice, rows: int) -> Any:
    """A listener to some of the rows that ``transcript`` knows; the others say nothing meanwhile."""

    def spread(values: np.ndarray) -> np.ndarray:
        whole = np.zeros(rows, values.dtype)
        whole[run] = values
        return whole

    def listener(tick: Any) -> np.ndarray:
        told = {name: value for name, value in vars(tick).items() if value is not None}
        own = {name: spread(value) for name, value in told.items() if name != "logits"}
        return transcript(dataclasses.replace(tick, **own))[run]

    return listener
