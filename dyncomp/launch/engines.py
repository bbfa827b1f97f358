"""The engines: which options each takes, which machines it has, how a job is handed over."""

import dataclasses
import difflib
import shutil
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.launch import jobset, sky, slurm, via_submitit, xpk
from dyncomp.launch.job import Job, Submission
from dyncomp.launch.machine import GPUS, TPUS, Machine

DEFAULTS = {"minutes": 24 * 60, "max_restarts": 3}
"""Of options that an engine takes and the user leaves out."""

NOT_FOR_ALL = (
    *("partition", "minutes", "sbatch", "at_once", "image", "storage", "cluster", "queue"),
    "max_restarts",
)
"""Fields of a `Job` that only some engines understand."""


def hand_over(job: Job, submission: Submission) -> None:
    """Writes the files and runs the commands; what they print is the user's to see.

    Raises:
      DyncompError: a command is missing or fails.
    """
    for tool in {command[0] for command in submission.commands}:
        if not shutil.which(tool):
            raise DyncompError(
                f"{tool} is not here: install it, or use --dry-run to see what it gets"
            )
    for path, text in submission.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for command in submission.commands:
        if code := subprocess.run(command).returncode:
            raise DyncompError(f"{' '.join(command[:3])} ... ended with code {code}")


def _through_submitit(job: Job, submission: Submission) -> None:
    for made in via_submitit.submit(job):
        print(f"submitted {made.job_id}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """One scheduler.

    Attributes:
      about: one line.
      write: a job's files and commands.
      needs: fields of the job that must be given.
      takes: fields that may be.
      machines: kinds of machines it has.
      submit: hands a job over.
    """

    about: str
    write: Callable[[Job], Submission]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    machines: tuple[str, ...]
    submit: Callable[[Job, Submission], None] = hand_over


_NODES = ("cpu", *GPUS)
ENGINES: Mapping[str, Engine] = {
    "slurm": Engine(
        about="a Slurm array job as a script for sbatch",
        write=slurm.write,
        needs=("partition",),
        takes=("minutes", "sbatch", "at_once"),
        machines=_NODES,
    ),
    "submitit": Engine(
        about="the same through submitit, which keeps a handle on every point",
        write=via_submitit.write,
        needs=("partition",),
        takes=("minutes", "sbatch", "at_once"),
        machines=_NODES,
        submit=_through_submitit,
    ),
    "jobset": Engine(
        about="Kubernetes JobSets",
        write=jobset.write,
        needs=("image", "storage"),
        takes=("queue", "max_restarts"),
        machines=(*_NODES, *TPUS),
    ),
    "xpk": Engine(
        about="workloads of a cluster that xpk made",
        write=xpk.write,
        needs=("cluster", "image", "storage"),
        takes=("max_restarts",),
        machines=tuple(kind for kind, names in {**GPUS, **TPUS}.items() if names.xpk),
    ),
    "sky": Engine(
        about="managed jobs of SkyPilot on any cloud",
        write=sky.write,
        needs=("storage",),
        takes=("image", "max_restarts"),
        machines=("cpu", *(kind for kind, names in {**GPUS, **TPUS}.items() if names.sky)),
    ),
}


def engine(name: str) -> Engine:
    """The engine called ``name``.

    Raises:
      DyncompError: there is none.
    """
    if name not in ENGINES:
        close = difflib.get_close_matches(name, ENGINES, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose out of {', '.join(ENGINES)}"
        raise DyncompError(f"no engine {name!r}: {hint}")
    return ENGINES[name]


def check(name: str, machine: Machine, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Job` that engine ``name`` understands, defaults filled in.

    Args:
      name: a key of `ENGINES`.
      machine: what the job asks for.
      given: values by field; None, or nothing in it, for one that is not given.

    Raises:
      DyncompError: a field is missing or not for this engine, or the engine has no such machine.
    """
    made = engine(name)
    known = {*made.needs, *made.takes}
    present = {field: value for field, value in given.items() if value not in (None, {})}
    for field in made.needs:
        if field not in present:
            raise DyncompError(f"engine {name} needs {_flag(field)}")
    for field in present:
        if field not in known:
            able = [other for other, e in ENGINES.items() if field in (*e.needs, *e.takes)]
            raise DyncompError(f"{_flag(field)} is not for engine {name} but for {', '.join(able)}")
    if machine.kind not in made.machines:
        raise DyncompError(
            f"engine {name} has no {machine.kind}; it has {', '.join(made.machines)}"
        )
    return {field: DEFAULTS[field] for field in DEFAULTS if field in known} | present


def _flag(field: str) -> str:
    return "--jobs" if field == "at_once" else f"--{field.replace('_', '-')}"
