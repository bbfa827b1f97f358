"""What happened since the last log line: metrics and events, summed step by step on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dyncomp.core.aux import Count, flatten
from dyncomp.training.guard import NotFiniteError


class Window:
    """Sums over steps; results stay on the device until `flush`, so that the loop never waits for a step.

    Sums are taken in float64 and Python integers in the order of the steps, so when `flush` is called changes no
    bit, and `dump` and `restore` carry a half-full window over a checkpoint exactly.
    """

    def __init__(self, dumped: Mapping[str, Any] | None = None):
        dumped = dumped or {}
        self.means: dict[str, list[float]] = {
            k: list(v) for k, v in dumped.get("means", {}).items()
        }
        self.events: dict[str, list[int]] = {
            k: list(v) for k, v in dumped.get("events", {}).items()
        }
        self.elements = int(dumped.get("elements", 0))
        self.pending: list[tuple[int, Any]] = []

    def add(self, step: int, out: Mapping[str, Any]) -> None:
        """Takes what the train step that ended as ``step`` returned, still on the device."""
        self.pending.append((step, out))

    def flush(self) -> list[tuple[int, float]]:
        """Fetches what is pending.

        Returns:
          (step, loss) of each step fetched.

        Raises:
          NotFiniteError: a loss or gradient norm is not finite; names the first such step.
        """
        fetched, self.pending = jax.device_get(self.pending), []
        for step, out in fetched:
            for name in ("loss", "grad_norm"):
                if not np.isfinite(out[name]):
                    raise NotFiniteError(f"{name} is {float(out[name])} at step {step}", step)
                self._mean(name, float(out[name]), 1.0)
            for name, mean in out["metrics"].items():
                self._mean(name, float(np.sum(mean.total)), float(np.sum(mean.count)))
            for path, counted in flatten(out["events"]).items():
                sums = self.events.setdefault(path, [0, 0])
                sums[0] += int(np.sum(counted.needed, dtype=np.int64))
                sums[1] += int(np.sum(counted.executed, dtype=np.int64))
            self.elements += int(out["elements"])
        return [(step, float(out["loss"])) for step, out in fetched]

    def _mean(self, name: str, total: float, count: float) -> None:
        sums = self.means.setdefault(name, [0.0, 0.0])
        sums[0] += total
        sums[1] += count

    @property
    def steps(self) -> int:
        """How many are summed."""
        return int(self.means.get("loss", [0.0, 0.0])[1])

    def counts(self) -> dict[str, Count]:
        """Events so far, for a `Ledger`."""
        return {path: Count(np.array(n), np.array(e)) for path, (n, e) in self.events.items()}

    def values(self) -> dict[str, float]:
        """Means over the window; loss and grad_norm are means over steps. NaN where nothing was counted."""
        return {name: t / c if c else float("nan") for name, (t, c) in self.means.items()}

    def dump(self) -> dict[str, Any]:
        """JSON-ready sums; call after `flush`."""
        return {"means": self.means, "events": self.events, "elements": self.elements}
