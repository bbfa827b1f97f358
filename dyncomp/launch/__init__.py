"""From one run, or the points of a sweep, to the files and commands of real schedulers."""

from dyncomp.launch.engines import ENGINES, Engine, check, engine
from dyncomp.launch.job import Job, Storage, Submission
from dyncomp.launch.machine import Machine, check_mesh

__all__ = [
    "ENGINES",
    "Engine",
    "Job",
    "Machine",
    "Storage",
    "Submission",
    "check",
    "check_mesh",
    "engine",
]
