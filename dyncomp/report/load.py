"""Reads what a run left; whatever is missing stays empty."""

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.core.errors import DyncompError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFiles:
    """The files of one work directory, read.

    Attributes:
      name: what the page calls the run.
      metrics: records of metrics.jsonl: step, split and figures.
      timings: records of timings.jsonl.
      summary: summary.json.
      pareto: the summary's points with ``flops_needed``, ``flops_executed``, ``seconds`` and the headline metric.
      decisions: arrays of decisions.npz, see `dyncomp.report.decisions`.
      exits: arrays of exits.npz, see `dyncomp.report.calibrated`.
      config: text of config.gin.
      environment: environment.json.
      damaged: names of files that are there but can't be read.
    """

    name: str
    metrics: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    summary: dict[str, Any]
    pareto: list[dict[str, Any]]
    decisions: dict[str, np.ndarray]
    exits: dict[str, np.ndarray]
    config: str
    environment: dict[str, Any]
    damaged: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """The metric a Pareto plot shows; "" where the run has none."""
        return str(self.summary.get("headline", ""))


def read_run(workdir: Path, name: str) -> RunFiles:
    """Reads a work directory.

    Raises:
      DyncompError: it holds nothing a report can show.
    """
    damaged: list[str] = []
    summary = _object(workdir / "summary.json", damaged)
    points = summary.get("pareto", [])
    config = workdir / "config.gin"
    run = RunFiles(
        name=name,
        metrics=_lines(workdir / "metrics.jsonl"),
        timings=_lines(workdir / "timings.jsonl"),
        summary=summary,
        pareto=[p for p in points if isinstance(p, dict)] if isinstance(points, list) else [],
        decisions=_arrays(workdir / "decisions.npz", damaged),
        exits=_arrays(workdir / "exits.npz", damaged),
        config=config.read_text(errors="replace") if config.is_file() else "",
        environment=_object(workdir / "environment.json", damaged),
        damaged=tuple(damaged),
    )
    if not any((run.metrics, run.summary, run.decisions)):
        raise DyncompError(
            f"{workdir} has nothing to report (no metrics.jsonl, summary.json or decisions.npz that can be read): "
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


def _object(path: Path, damaged: list[str]) -> dict[str, Any]:
    """A JSON object; {} where there is none. The name of a file that can't be read is added to ``damaged``."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict):
        return found
    damaged.append(path.name)
    return {}


def _arrays(path: Path, damaged: list[str]) -> dict[str, np.ndarray]:
    """Arrays of an npz file, as `_object`."""
    try:
        with path.open("rb") as file, np.load(file) as found:
            return {name: found[name] for name in found.files}
    except FileNotFoundError:
        return {}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile, zlib.error):
        damaged.append(path.name)
        return {}


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
