"""Networks of segments, run once more after training the way they are served: same ways, same quality, less time?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "executed.json"


def executed(runs: Mapping[str, Any], workdir: Path, *, quick: bool = False) -> dict[str, Any]:
    """What `runtime.evaluate.executed_split` finds of each run on the test split; kept in its executed.json.

    Args:
      runs: folder below ``workdir`` ("" for itself) -> run; those without segments are left out.
      workdir: of the run or the suite.
      quick: one batch.
    """
    from dyncomp.runtime.evaluate import executed_split, separate
    from dyncomp.training.restore import load

    found = {}
    for name, run in runs.items():
        folder = workdir / name
        if separate(run.model) is None or not (folder / "summary.json").exists():
            continue
        path = folder / RECORD
        if not path.exists():
            variables = load(folder, run).variables
            record = executed_split(run, variables, "test", 1 if quick else run.final_eval_batches)
            path.write_text(json.dumps(record, indent=1) + "\n")
        found[name] = json.loads(path.read_text())
    return found


def said(headline: str, record: Mapping[str, Any]) -> str:
    """One line about a network that ran segment by segment."""
    host, masked = 1e6 * record["seconds"], 1e6 * record["seconds_masked"]
    return (
        f"run segment by segment: {headline} {record['quality'][headline]:.4g}; {record['other_ways']} of"
        f" {record['examples']} examples took another way than in the model's own pass; {host:.0f} microseconds an"
        f" example (everything for everyone: {masked:.0f})"
    )
