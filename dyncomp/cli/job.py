"""Flags that make a command one process of several, and what such a process does to join and to end."""

import argparse
import contextlib
import ctypes
import dataclasses
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from dyncomp.core.errors import DyncompError

STREAMS = "DYNCOMP_STREAMS"
"""Set for a process that runs under a parent (`dyncomp.cli.supervise`): descriptors for its own output and errors."""
STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED): ")
"""How the runtime's errors begin when another process may be why."""
PR_SET_PDEATHSIG = 1
"""An option of prctl(2)."""
NAMES = ("coordinator", "processes", "process")


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place in a job; all None: the cluster says.

    Attributes:
      coordinator: ``HOST:PORT`` of process 0.
      processes: how many there are.
      process: which one this is.
      local: which one of this host, where the parent started several.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    local: int | None = None

    def environment(self) -> dict[str, str]:
        """What tells a child its place."""
        given = dataclasses.asdict(self).items()
        return {variable(name): str(value) for name, value in given if value is not None}


def variable(name: str) -> str:
    """The environment variable that stands for a flag."""
    return f"DYNCOMP_{name.upper()}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--spawn``, ``--distributed``, ``--coordinator``, ``--processes`` and ``--process``."""
    about = (
        "One run on many devices; the same command in every process, one folder that all see. A process that is lost "
        "ends the others within a minute, with the exit code of --preempt-code: start the command again."
    )
    group = parser.add_argument_group("several processes", about)
    group.add_argument("--spawn", type=int, metavar="N", help="start N processes on this host")
    said = (
        "take part in the job of Slurm, Open MPI, Kubernetes or Cloud TPU that this was started in"
    )
    group.add_argument("--distributed", action="store_true", help=said)
    helps = ("address of process 0", "how many there are", "which one this is, from 0")
    for name, metavar, text in zip(NAMES, ("HOST:PORT", "N", "I"), helps, strict=True):
        default = os.environ.get(variable(name))
        text += f" (default: ${variable(name)})"
        kind = str if name == "coordinator" else int
        group.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)


def place_of(args: argparse.Namespace) -> Place | None:
    """Where this process stands in a job; None for a program of one process.

    Raises:
      DyncompError: flags that do not go together.
    """
    given = {name: getattr(args, name) for name in NAMES}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(NAMES):
        raise DyncompError(f"several processes need {' and '.join(missing)} too")
    if args.spawn is not None and args.spawn < 1:
        raise DyncompError(f"--spawn {args.spawn}: write 1 or more")
    if args.spawn is not None and not supervised() and (args.distributed or not missing):
        raise DyncompError("--spawn starts all processes itself: leave the other flags out")
    if not missing:
        if not 0 <= args.process < args.processes:
            raise DyncompError(f"--process {args.process}: use 0 to {args.processes - 1}")
        local = os.environ.get(variable("local"))
        return Place(**given, local=None if local is None else int(local))
    return Place() if args.distributed else None


def supervised(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a parent looks after this process."""
    return STREAMS in environment


@contextlib.contextmanager
def joined(place: Place) -> Iterator[None]:
    """The body runs as one process of the job; descriptors 1 and 2, where native code speaks, are the parent's."""
    _die_with_parent()
    out, err = map(int, os.environ[STREAMS].split(","))
    sys.stdout, sys.stderr = os.fdopen(out, "w"), os.fdopen(err, "w", buffering=1)
    logging.basicConfig(stream=sys.__stderr__)  # what libraries log is for the parent too
    from dyncomp.parallel import processes

    where = (place.coordinator, place.processes, place.process)
    processes.join(*where, local_device=place.local)
    try:
        yield
    except Exception as error:
        patience = processes.SHUTDOWN_SECONDS / 2
        # A collective fails as soon as a process is gone; the runtime ends this one when it knows which.
        if not isinstance(error, DyncompError) and STATUS.match(str(error)):
            time.sleep(processes.HEARTBEAT_SECONDS + patience)
            patience = 1.0  # nobody is left to wait for
        _end_before_the_runtime(getattr(error, "exit_code", 1), patience)
        raise


def _end_before_the_runtime(code: int, seconds: float) -> None:
    """Ends this process with ``code`` if it still waits for the others by then: the runtime would abort it."""
    watch = threading.Timer(seconds, os._exit, [code])
    watch.daemon = True
    watch.start()


def _die_with_parent() -> None:
    """Asks Linux to kill this process when its parent is gone: nobody else would."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
