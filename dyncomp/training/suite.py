"""Several runs that are compared with each other: a method, its baselines, an ablation."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Runs by name; each trains in its own folder below the work directory.

    Attributes:
      runs: name -> Run. The first is the method, the others are what it is compared with.
      select: when set, the suite stands for this one run (how a member's saved config is read back).
    """

    runs: Mapping[str, Run]
    select: str = ""

    def __post_init__(self):
        if not self.runs:
            raise DyncompError("Suite.runs is empty: name at least one run")
        for name in self.runs:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise DyncompError(
                    f"Suite.runs: {name!r} is no folder name; use letters, digits, _ and -"
                )
        if self.select and self.select not in self.runs:
            raise DyncompError(
                f"Suite.select={self.select!r}: choose one of {', '.join(self.runs)}"
            )

    def selected(self) -> Run | None:
        """The one run this suite stands for, or None."""
        return self.runs[self.select] if self.select else None


def train_suite(
    suite: Suite, workdir: Path, *, config_text: str = "", **options: Any
) -> dict[str, Any]:
    """Trains every run in turn (finished ones are skipped by their own resume) and writes ``suite.json``.

    Args:
      suite: the runs.
      workdir: parent folder; run ``name`` goes to ``workdir/name``.
      config_text: the resolved config; each member is saved with ``training.Suite.select`` set to its name.
      **options: passed to `dyncomp.training.loop.train`.

    Returns:
      ``{"suite": {name: summary of that run}}``.
    """
    from dyncomp.parallel.processes import lead
    from dyncomp.training.loop import train

    summaries = {}
    for name, run in suite.runs.items():
        text = f"{config_text}\ntraining.Suite.select = {name!r}\n" if config_text else ""
        summaries[name] = train(run, workdir / name, config_text=text, **options)
    result = {"suite": summaries}
    if lead():
        (workdir / "suite.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    return result
