"""Slurm: one batch script, an array task a point."""

import shlex
import sys
from collections.abc import Iterator

from dyncomp.core.errors import PREEMPTED
from dyncomp.launch.job import Job, Submission
from dyncomp.launch.machine import Machine
from dyncomp.launch.processes import under_slurm

SECONDS_TO_SAVE = 120
"""Between the signal and the end of a job's time."""

REQUEUE = (
    "code=$?",
    f'if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    'exit "$code"',
)
"""Shell lines after ``srun``, which returns the highest exit code of its tasks. A job that has saved and wants to go
on is queued again under its own number; Slurm then ends the script."""


def options(job: Job) -> dict[str, str | None]:
    """Options of ``sbatch`` by name; None is a flag. What the user names wins."""
    return {
        "job-name": job.name,
        "partition": job.partition,
        "time": str(job.minutes),
        **layout(job.machine),
        "requeue": None,  # when a node fails or a job of more importance takes it
        "signal": f"TERM@{SECONDS_TO_SAVE}",  # to the tasks, not to the script
        "open-mode": "append",
        **job.sbatch,
    }


def layout(machine: Machine) -> dict[str, str]:
    """Nodes and tasks: a task a GPU, as ``jax.distributed`` takes it under Slurm."""
    tasks = {"nodes": str(machine.hosts), "ntasks-per-node": str(machine.per_host)}
    if machine.family == "cpu":
        return tasks
    kind = "" if machine.kind == "gpu" else f"{machine.kind}:"
    return {**tasks, "gpus-per-node": f"{kind}{machine.per_host}"}


def write(job: Job) -> Submission:
    """The script and the command that submits it."""
    script = job.folder / f"{job.name}.sbatch"
    return Submission({script: "\n".join(_lines(job)) + "\n"}, [["sbatch", str(script)]])


def _lines(job: Job) -> Iterator[str]:
    last = len(job.points) - 1
    limit = f"%{job.at_once}" if job.at_once else ""
    yield "#!/bin/bash"
    for name, value in {
        **options(job),
        "array": f"0-{last}{limit}",
        "output": str(job.folder / "%A_%a.log"),
    }.items():
        yield f"#SBATCH --{name}" + ("" if value is None else f"={shlex.quote(value)}")
    yield ""
    # srun does not take this one over from sbatch, and refuses it beside others where it was not asked for.
    yield 'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi'
    yield 'case "$SLURM_ARRAY_TASK_ID" in'
    for number, arguments in enumerate(job.points):
        yield f"{number}) set -- {shlex.join([*arguments, *under_slurm(job.machine)])} ;;"
    yield "esac"
    yield f'srun {shlex.quote(sys.executable)} -m dyncomp "$@"'
    yield from REQUEUE
