"""What decoding gives to the host: step by step, and a sequence at a time."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

Reason = Literal["eos", "length", "stop", "policy"]


@dataclasses.dataclass(frozen=True)
class Tick:
    """One step of all sequences.

    Attributes:
      tokens: int32 [b].
      emitted: bool [b], whether the row's token belongs to its sequence.
      depths: int32 [b], blocks that the token ran.
      ended: bool [b], rows that end here; their token, if any, is the one that ends.
      stopped: bool [b], of these the ones that the policy ended.
      logits: float32 [b v] where asked, else None.
    """

    tokens: np.ndarray
    emitted: np.ndarray
    depths: np.ndarray
    ended: np.ndarray
    stopped: np.ndarray
    logits: Any = None


@dataclasses.dataclass
class Generated:
    """What came out of one prompt.

    Attributes:
      tokens: without the prompt and without the token that ended it.
      depths: blocks that each token ran.
      reason: "eos"; "length", as many as were asked for; "stop", the listener ended it; "policy".
      logits: float32 [t v] where asked, else None; of the tokens above.
    """

    tokens: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    reason: Reason = "length"
    logits: Any = None


def collect(
    ticks: Iterable[Tick], rows: int, listener: Callable[[Tick], Any] | None = None
) -> list[Generated]:
    """Gathers steps into sequences.

    Args:
      ticks: in order.
      rows: b.
      listener: sees every step; may return a bool [b] of rows that shall end, their last token included.
    """
    found, closed = [Generated() for _ in range(rows)], np.zeros(rows, bool)
    for tick in ticks:
        asked = listener(tick) if listener else None
        asked = np.zeros(rows, bool) if asked is None else np.asarray(asked)
        for row, one in enumerate(found):
            if not closed[row]:
                _add(one, tick, row, bool(asked[row]))
        closed |= tick.ended | asked
        if closed.all():
            break
    for one in found:
        one.logits = np.stack(one.logits) if one.logits else None
    return found


def _add(one: Generated, tick: Tick, row: int, asked: bool) -> None:
    if tick.emitted[row]:
        one.tokens.append(int(tick.tokens[row]))
        one.depths.append(int(tick.depths[row]))
        if tick.logits is not None:
            one.logits = [*(one.logits or []), tick.logits[row]]
    if tick.ended[row]:
        one.reason = "policy" if tick.stopped[row] else "eos"
    elif asked:
        one.reason = "stop"
