"""Looks at every loss: what is no number, and what is far above the losses before it."""

import collections
import statistics
from collections.abc import Iterable

from dyncomp.core.errors import DyncompError

RECENT = 100
ENOUGH = 20
"""Losses that a median needs."""


class LossError(DyncompError):
    """A loss that training should not go on from.

    Attributes:
      step: the step that ended with it.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class NotFiniteError(LossError):
    """A loss or a gradient stopped being a number."""


class SpikeError(LossError):
    """A loss is far above those before it."""


class Guard:
    """Remembers the last `RECENT` losses.

    Args:
      spike: how many times their median is too much; None looks for no spikes.
      recent: losses to start from, oldest first.
    """

    def __init__(self, spike: float | None, recent: Iterable[float] = ()):
        self.spike = spike
        self.recent = collections.deque(recent, maxlen=RECENT)

    def look(self, losses: Iterable[tuple[int, float]]) -> None:
        """Takes (step, loss) in order.

        Raises:
          SpikeError: naming the first loss that is too large; later ones are not taken.
        """
        for step, loss in losses:
            if self.spike is not None and len(self.recent) >= ENOUGH:
                usual = statistics.median(self.recent)
                if loss > self.spike * usual:
                    raise SpikeError(
                        f"loss is {loss:.4g} at step {step}, {loss / usual:.3g} times the median of the "
                        f"{len(self.recent)} before",
                        step,
                    )
            self.recent.append(loss)
