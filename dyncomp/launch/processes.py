"""How the processes of one job find each other: the only place that says so.

``jax.distributed`` knows by itself under Slurm's ``srun`` and on Cloud TPUs, whose machines are told by their
environment, once ``dyncomp run`` is told that it is one of several. Elsewhere it is told where the others are.
"""

from dyncomp.launch.machine import Machine

PORT = 8476
"""Where the first process listens."""

DETECT = "--distributed"
"""Flag of ``dyncomp run``: take part in the job that the environment describes."""


def under_slurm(machine: Machine) -> list[str]:
    """Flags of a task, of which there is one for each GPU or node."""
    return [DETECT] if machine.chips > 1 else []


def flags(machine: Machine, coordinator: str, processes: str, process: str) -> str:
    """Flags as shell text that begins with a space, one process a host; empty where there is one.

    Args:
      machine: what the job runs on.
      coordinator: shell text of the first process's host and port.
      processes, process: shell text of their number and of this one's.
    """
    if machine.hosts == 1:
        return ""
    if machine.family == "tpu":
        return f" {DETECT}"
    return f' --coordinator "{coordinator}" --processes "{processes}" --process "{process}"'
