"""A job: what runs where, and what a scheduler is given for it."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from dyncomp.core.errors import DyncompError
from dyncomp.launch.machine import Machine

LONGEST_NAME = 35
"""xpk takes 40, Kubernetes 63 for a pod, to whose name JobSet adds; and points are numbered."""

SHORTEST_MINUTES = 5
"""Of a job: a shorter one would be told to save before it has made progress, again and again."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A place that outlives a job.

    Attributes:
      source: a volume claim (JobSet), an attached storage (xpk), a bucket's address (SkyPilot).
      path: where the job sees it.
    """

    source: str
    path: PurePosixPath

    @classmethod
    def parse(cls, text: str) -> "Storage":
        """``SOURCE:PATH``; a source may hold colons of its own.

        Raises:
          DyncompError: no source, or a path that is not absolute.
        """
        source, _, path = text.rpartition(":")
        if not source or not path.startswith("/") or path.startswith("//"):
            raise DyncompError(f"--storage {text!r}: write SOURCE:/PATH, as in checkpoints:/data")
        return cls(source, PurePosixPath(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run, or the points of a sweep as one job each, of one shape.

    Attributes:
      name: small letters, digits and dashes; points are numbered behind it.
      points: arguments of ``dyncomp`` for each point.
      workdir: of the run or the sweep, as the job sees it.
      machine: what each point runs on.
      partition, minutes, sbatch: of Slurm: the queue, the time limit, further options of ``sbatch`` by name.
      at_once: points that may run at a time; None for no limit.
      image: of a container with dyncomp in it.
      storage: what holds ``workdir``; None for a file system that all machines share.
      cluster: of xpk.
      queue: of Kueue, for JobSet.
      max_restarts: after failures that are no preemption.
    """

    name: str
    points: Sequence[Sequence[str]]
    workdir: Path
    machine: Machine
    partition: str | None = None
    minutes: int | None = None
    sbatch: Mapping[str, str] = dataclasses.field(default_factory=dict)
    at_once: int | None = None
    image: str | None = None
    storage: Storage | None = None
    cluster: str | None = None
    queue: str | None = None
    max_restarts: int | None = None

    def __post_init__(self):
        if (
            not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", self.name)
            or len(self.name) > LONGEST_NAME
        ):
            raise DyncompError(
                f"--name {self.name!r}: use small letters, digits and dashes, {LONGEST_NAME} at most"
            )
        if self.minutes is not None and self.minutes < SHORTEST_MINUTES:
            raise DyncompError(
                f"--minutes {self.minutes}: use {SHORTEST_MINUTES} or more; the last two are for saving"
            )
        if self.max_restarts is not None and self.max_restarts < 0:
            raise DyncompError(f"--max-restarts {self.max_restarts}: use 0 or more")
        if self.storage and not PurePosixPath(self.workdir).is_relative_to(self.storage.path):
            raise DyncompError(
                f"--workdir {self.workdir} is not below {self.storage.path}, where --storage is: a job that "
                "starts again would find nothing there"
            )

    @property
    def folder(self) -> Path:
        """Where the scheduler's files are written: in the work directory, or here if that lies in a storage."""
        return Path("launch") if self.storage else self.workdir / "launch"

    def names(self) -> list[str]:
        """A name for each point."""
        many = len(self.points) > 1
        return [f"{self.name}-{n}" if many else self.name for n in range(len(self.points))]


@dataclasses.dataclass(frozen=True)
class Submission:
    """What a scheduler is given.

    Attributes:
      files: path -> text; commands name these paths.
      commands: to be run one after another.
    """

    files: Mapping[Path, str]
    commands: Sequence[Sequence[str]]

    def text(self) -> str:
        """Files and commands, for reading."""
        files = [f"# {path}\n{text.rstrip()}\n" for path, text in self.files.items()]
        return "\n".join([*files, *(f"$ {shlex.join(command)}" for command in self.commands)])


def name_of(text: str) -> str:
    """A job's name made of any text."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:LONGEST_NAME].rstrip("-")
