"""xpk: a command a point; xpk writes the JobSet for clusters that it made."""

import shlex
from collections.abc import Sequence

from dyncomp.core.errors import PREEMPTED, DyncompError
from dyncomp.launch import processes
from dyncomp.launch.job import Job, Submission
from dyncomp.launch.jobset import SECONDS_TO_SAVE


def write(job: Job) -> Submission:
    """Commands only."""
    named = zip(job.names(), job.points, strict=True)
    return Submission({}, [_command(job, name, arguments) for name, arguments in named])


def _command(job: Job, name: str, arguments: Sequence[str]) -> list[str]:
    assert job.storage is not None and job.image and job.cluster  # `engines.check` asks for them
    return [
        *("xpk", "workload", "create"),
        *("--cluster", job.cluster),
        *("--workload", name),
        *("--docker-image", job.image),
        *_machine(job),
        *("--storage", job.storage.source),
        # Restarts after a saved run count like others here: xpk has one limit for both.
        *("--restart-on-exit-codes", str(PREEMPTED)),
        *("--max-restarts", str(job.max_restarts)),
        *("--termination-grace-period-seconds", str(SECONDS_TO_SAVE)),
        *("--command", _shell(job, arguments)),
    ]


def _machine(job: Job) -> list[str]:
    machine = job.machine
    if machine.family == "tpu":
        return ["--tpu-type", f"{machine.names.xpk}-{machine.topology}"]
    return [
        *("--device-type", f"{machine.names.xpk}-{machine.per_host}"),
        *("--num-nodes", str(machine.hosts)),
    ]


def _shell(job: Job, arguments: Sequence[str]) -> str:
    """Shell text. xpk puts it into quotes of YAML on GPUs, so it can't hold any of its own there."""
    joined = processes.flags(
        job.machine,
        "$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT",
        str(job.machine.hosts),
        "$NODE_RANK",
    ).replace('"', "")
    # exec: xpk hands the signal that ends a pod to what it started.
    text = f"exec dyncomp {shlex.join(arguments)}{joined}"
    if job.machine.family == "gpu" and set(text) & set('"\\'):
        raise DyncompError(
            f"xpk can't pass quotes within quotes to GPUs ({text}): write the override into a config"
        )
    return text
