"""SkyPilot: a managed job a point, on whichever cloud has the machines."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dyncomp.core.errors import PREEMPTED, DyncompError
from dyncomp.launch import processes
from dyncomp.launch.job import Job, Submission
from dyncomp.launch.jobset import WIDTH
from dyncomp.launch.machine import Machine


def write(job: Job) -> Submission:
    """A task file for each point and the command that makes a managed job of it."""
    files, commands = {}, []
    for name, arguments in zip(job.names(), job.points, strict=True):
        path = job.folder / f"{name}.sky.yaml"
        files[path] = yaml.safe_dump(task(job, name, arguments), sort_keys=False, width=WIDTH)
        commands.append(["sky", "jobs", "launch", "--yes", "--detach-run", str(path)])
    return Submission(files, commands)


def task(job: Job, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """SkyPilot's description of one point.

    Raises:
      DyncompError: no image, and no checkout to install from.
    """
    assert job.storage is not None  # `engines.check` asks for it
    joined = processes.flags(
        job.machine,
        f'$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{processes.PORT}',
        "$SKYPILOT_NUM_NODES",
        "$SKYPILOT_NODE_RANK",
    )
    mount = {"source": job.storage.source, "mode": "MOUNT"}
    return {
        "name": name,
        **_code(job),
        # The machines of a TPU slice are one node to SkyPilot, which runs the command on each.
        "num_nodes": 1 if job.machine.family == "tpu" else job.machine.hosts,
        "resources": _resources(job),
        "file_mounts": {str(job.storage.path): mount},
        "run": f"dyncomp {shlex.join(arguments)}{joined}",
    }


def _resources(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if job.machine.family != "cpu":
        found["accelerators"] = _accelerators(job.machine)
    if job.image:
        found["image_id"] = f"docker:{job.image}"
    found["job_recovery"] = {
        "max_restarts_on_errors": job.max_restarts,
        "recover_on_exit_codes": [PREEMPTED],
    }
    return found


def _accelerators(machine: Machine) -> str:
    if machine.family == "tpu":
        return f"{machine.names.sky}-{machine.chips * machine.names.cores}"
    return f"{machine.names.sky}:{machine.per_host}"


def _code(job: Job) -> dict[str, str]:
    """Where dyncomp comes from: the image, or the checkout in the current folder."""
    if job.image:
        return {}
    if not Path("constraints.txt").is_file():
        raise DyncompError("engine sky: give --image, or launch from a checkout of dyncomp")
    extra = "" if job.machine.family == "cpu" else f"[{job.machine.family}]"
    return {"workdir": ".", "setup": f"pip install '.{extra}' -c constraints.txt"}
