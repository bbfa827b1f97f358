"""Reads what a run left; whatever is missing stays empty."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyncomp.core.errors import DyncompError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one work directory, read.

    Attributes:
      name: what the page calls the run.
      metrics: records of metrics.jsonl: step, split and figures.
      timings: records of timings.jsonl.
      summary: summary.json.
      pareto: points with ``flops_needed``, ``flops_executed``, ``seconds`` and the headline metric.
      decisions: decisions.json, see `dyncomp.report.decisions`.
      config: text of config.gin.
      environment: environment.json.
    """

    name: str
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    summary: dict[str, Any]
    pareto: list[dict[str, Any]]
    decisions: dict[str, Any]
    config: str
    environment: dict[str, Any]

    @property
    def headline(self) -> str:
        """The metric a Pareto plot shows; "" where the run has none."""
        return str(self.summary.get("headline", ""))


def read_run(workdir: Path, name: str) -> RunFiles:
    """Reads a work directory.

    Raises:
      DyncompError: it holds nothing a report can show.
    """
    summary = _object(workdir / "summary.json")
    pareto = _json(workdir / "pareto.json")
    points = pareto if isinstance(pareto, list) else summary.get("pareto", [])
    config = workdir / "config.gin"
    run = RunFiles(
        name=name,
        metrics=_lines(workdir / "metrics.jsonl"),
        timings=_lines(workdir / "timings.jsonl"),
        summary=summary,
        pareto=[p for p in points if isinstance(p, dict)] if isinstance(points, list) else [],
        decisions=_object(workdir / "decisions.json"),
        config=config.read_text(errors="replace") if config.is_file() else "",
        environment=_object(workdir / "environment.json"),
    )
    if not any((run.metrics, run.summary, run.pareto, run.decisions)):
        raise DyncompError(
            f"{workdir} has nothing to report (no metrics.jsonl, summary.json, pareto.json or decisions.json): "
            "give the --workdir of a run"
        )
    return run


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file; a line that was cut off ends it."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        if isinstance(record, dict) and number(record.get("step")) is not None:
            records.append(record)
    return records
