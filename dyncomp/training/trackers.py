"""Where metrics go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases when asked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dyncomp.core.errors import DyncompError

KINDS = ("jsonl", "tensorboard", "wandb")


@runtime_checkable
class Tracker(Protocol):
    """Takes one record of metrics at a time."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Records values of a step."""
        ...

    def close(self) -> None:
        """Flushes."""
        ...


class JsonLines:
    """One JSON object a line. Content is deterministic, so an interrupted run ends with the same bytes."""

    def __init__(self, path: Path, step: int):
        self.path = path
        truncate(path, step)
        self.stream = path.open("a")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends and flushes."""
        self.stream.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self.stream.close()


FINAL = "test"
"""The split of the last record; a resumed run writes it again."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; a line that was cut off ends it."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def truncate(path: Path, step: int) -> None:
    """Drops records after ``step``, the final one, and a line that was cut off; in one step of the file system."""
    if not path.exists():
        return
    kept = [
        json.dumps(record) + "\n"
        for record in read_records(path)
        if record["step"] <= step and record["split"] != FINAL
    ]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept))
    scratch.replace(path)


class TensorBoard:
    """Event files through tensorboardX."""

    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Writes scalars."""
        for name, value in values.items():
            self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes."""
        self.writer.close()


class WeightsAndBiases:
    """A run of the optional package wandb."""

    def __init__(self, folder: Path):
        try:
            import wandb  # pyrefly: ignore
        except ImportError:
            raise DyncompError(
                '--tracker wandb needs the package: pip install "dyncomp[wandb]"'
            ) from None
        self.run = wandb.init(project="dyncomp", dir=str(folder), name=folder.name, resume="allow")

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Logs scalars."""
        self.run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finishes the run."""
        self.run.finish()


def make_trackers(kinds: Sequence[str], workdir: Path, step: int) -> list[Tracker]:
    """Trackers by name; jsonl is always among them.

    Raises:
      DyncompError: unknown kind or missing package.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise DyncompError(f"unknown tracker {unknown[0]!r}: use {', '.join(KINDS)}")
    trackers: list[Tracker] = [JsonLines(workdir / "metrics.jsonl", step)]
    trackers += [TensorBoard(workdir / "tensorboard")] if "tensorboard" in kinds else []
    trackers += [WeightsAndBiases(workdir)] if "wandb" in kinds else []
    return trackers
