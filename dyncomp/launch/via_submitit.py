"""Slurm from Python: submitit writes the script and gives a handle on every point."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from dyncomp.core.errors import PREEMPTED, DyncompError
from dyncomp.launch import slurm
from dyncomp.launch.job import Job, Submission
from dyncomp.launch.processes import under_slurm


def task(arguments: Sequence[str]) -> None:
    """What submitit calls in every process of a point.

    Leaving with the code of a saved run keeps submitit from writing down a result: the script queues the job again.

    Raises:
      RuntimeError: the run failed.
    """
    code = subprocess.run([sys.executable, "-m", "dyncomp", *arguments]).returncode
    if code == PREEMPTED:
        sys.exit(code)
    if code:
        raise RuntimeError(f"dyncomp ended with code {code}")


def executor(job: Job, here: bool = True) -> Any:
    """A `submitit.SlurmExecutor` with the job's options.

    Args:
      job: what to run.
      here: whether jobs can be submitted from this machine; else it only writes scripts.

    Raises:
      DyncompError: submitit is missing, or this is no machine of a Slurm cluster.
    """
    try:
        import submitit  # pyrefly: ignore[missing-import]
    except ImportError:
        raise DyncompError(
            'engine submitit needs submitit: pip install "dyncomp[launch]"'
        ) from None

    class Writer(submitit.SlurmExecutor):
        """Does not ask for Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    kind = submitit.SlurmExecutor if here else Writer
    if kind.affinity() < 0:
        raise DyncompError(
            "srun is not here: submit from a machine of the cluster, or use --dry-run"
        )
    made = kind(folder=job.folder / "%j")
    made.update_parameters(**_parameters(job))
    return made


def _parameters(job: Job) -> dict[str, Any]:
    given = slurm.options(job)
    named = {
        "job_name": given.pop("job-name"),
        "partition": given.pop("partition"),
        "nodes": job.machine.hosts,
        "ntasks_per_node": job.machine.per_host,
        "time": job.minutes,
        "stderr_to_stdout": True,
        "teardown": list(slurm.REQUEUE),
        "array_parallelism": job.at_once or len(job.points),
    }
    rest = {k: True if v is None else v for k, v in given.items() if k not in SAID}
    return {**named, "additional_parameters": rest}


SAID = ("nodes", "ntasks-per-node", "time")
"""Options of ``sbatch`` that submitit has parameters for."""


def write(job: Job) -> Submission:
    """The script as submitit writes it; submitting it needs what `submit` puts beside it."""
    made = executor(job, here=False)
    if len(job.points) > 1:
        made.parameters["map_count"] = len(job.points)
    text = made._make_submission_file_text(made._submitit_command_str, "")
    return Submission({job.folder / f"{job.name}.sbatch": text}, [])


def submit(job: Job) -> list[Any]:
    """Submits the points as one array.

    Returns:
      A `submitit.Job` for each.
    """
    points = [[*arguments, *under_slurm(job.machine)] for arguments in job.points]
    return executor(job).map_array(task, points)
