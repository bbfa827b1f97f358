"""How the processes of one job find each other: the only place that says so.

``jax.distributed`` knows by itself under Slurm's ``srun`` and on Cloud TPUs, whose machines are told by their
environment. Elsewhere ``dyncomp run`` is told by flags.
"""

from dyncomp.launch.machine import Machine

PORT = 8476
"""Where the first process listens."""


def flags(machine: Machine, coordinator: str, processes: str, process: str) -> str:
    """Flags of ``dyncomp run`` as shell text, one process a host; none where JAX knows or there is one process.

    Args:
      machine: what the job runs on.
      coordinator: shell text of the first process's host and port.
      processes, process: shell text of their number and of this one's.
    """
    if machine.hosts == 1 or machine.family == "tpu":
        return ""
    return f' --coordinator "{coordinator}" --processes "{processes}" --process "{process}"'
