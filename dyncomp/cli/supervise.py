"""A small parent of one process of a job, or of all of them on this host.

JAX's runtime ends a process that has lost another with a native abort, which no handler in that process can catch. So
the parent forwards signals, hears native complaints on a file instead of the terminal, and says in one line which
process was lost and what is saved.
"""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from dyncomp.cli.job import STREAMS, Place
from dyncomp.core.loopback import free_address
from dyncomp.core.workdir import newest_step

POLL_SECONDS = 0.1
STOPPED_SECONDS = 20
"""A process that has been stopped (SIGSTOP) for so long is lost."""
GRACE_SECONDS = 10
"""How long the others may take once one has ended by itself with an error, and the runtime once it has given up."""
SAVE_SECONDS = 300
"""How long they may take once one has saved and stopped."""
GIVEN_UP = "Terminating process because the JAX distributed service detected fatal errors"
"""What the runtime says before it aborts, which may take long: it looks up names for a stack that nobody reads."""
FORWARDED = (signal.SIGTERM, signal.SIGINT)


@dataclasses.dataclass
class Child:
    """A process of the job.

    Attributes:
      place: in the job.
      process: the process itself.
      log: where its native code complains.
      stopped: since when it has been stopped, or None.
      read: how much of the log was looked at.
      doomed: since when the runtime has given up, or None.
    """

    place: Place
    process: subprocess.Popen
    log: Path
    stopped: float | None = None
    read: int = 0
    doomed: float | None = None

    def look(self, now: float) -> str:
        """Why it counts as lost; "" while it runs or has ended by itself."""
        code = self.process.poll()
        if code is not None:
            return f"killed by {signal.Signals(-code).name}" if code < 0 else ""
        try:
            halted = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        except psutil.NoSuchProcess:
            return ""
        self.stopped = (self.stopped or now) if halted else None
        if self.stopped is not None and now - self.stopped > STOPPED_SECONDS:
            return f"stopped for {STOPPED_SECONDS} s"
        return "given up by the runtime" if self._lingers(now) else ""

    def _lingers(self, now: float) -> bool:
        """Whether it has not ended although the runtime gave up `GRACE_SECONDS` ago."""
        size = self.log.stat().st_size
        if size != self.read and self.doomed is None:
            self.read = size
            self.doomed = now if GIVEN_UP in self.log.read_text(errors="replace") else None
        return self.doomed is not None and now - self.doomed > GRACE_SECONDS


def spawned(count: int) -> list[Place]:
    """Places of ``count`` processes on this host."""
    address = free_address()
    return [Place(address, count, index, index) for index in range(count)]


def supervise(words: Sequence[str], places: Sequence[Place], workdir: Path, lost_code: int) -> int:
    """Runs ``dyncomp`` with ``words`` in every place until all have ended.

    Args:
      words: the command line, without the program's name.
      places: of the processes on this host.
      workdir: where the run saves.
      lost_code: exit code that asks a scheduler to start the job again.

    Returns:
      0 when all ended so, ``lost_code`` when one was lost, else the first other exit code.
    """
    with tempfile.TemporaryDirectory(prefix="dyncomp-") as folder:
        children: list[Child] = []
        with _forwarding(children):
            try:
                for number, place in enumerate(places):
                    children.append(_start(words, place, Path(folder) / f"{number}.log", number))
                lost = _watch(children, lost_code)
            finally:
                _kill(children)
        if lost is not None:
            if "--debug" in words:
                print(lost[0].log.read_text(errors="replace"), file=sys.stderr)
            print(_line(*lost, workdir), file=sys.stderr)
            return lost_code
        return _code(children)


def _start(words: Sequence[str], place: Place, log: Path, number: int) -> Child:
    """Starts a process; its own words reach the terminal where it is the first of this host."""
    with log.open("wb") as native:
        files = (sys.__stdout__, sys.__stderr__) if number == 0 else (native, native)
        streams = [os.dup(file.fileno()) for file in files if file]
        told = {STREAMS: ",".join(map(str, streams))}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "dyncomp", *words],
                env={**os.environ, **place.environment(), **told},
                stdout=native,
                stderr=native,
                pass_fds=streams,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which forwards it
            )
        finally:
            for stream in streams:
                os.close(stream)
    return Child(place, process, log)


@contextlib.contextmanager
def _forwarding(children: list[Child]) -> Iterator[None]:
    """Signals to the parent go on to the children."""

    def forward(number: int, _: object) -> None:
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children: list[Child], lost_code: int) -> tuple[Child, str] | None:
    """Waits until all have ended or one is lost: (which, why)."""
    deadline = float("inf")
    while True:
        now = time.monotonic()
        for child in children:
            if why := child.look(now):
                return child, why
        codes = [child.process.returncode for child in children]
        if None not in codes or now > deadline:
            return None
        if deadline == float("inf") and (ended := {code for code in codes if code}):
            deadline = now + (SAVE_SECONDS if ended == {lost_code} else GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _kill(children: list[Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.kill()
        child.process.wait()


def _code(children: list[Child]) -> int:
    """The exit code of the job; what only a later process said is shown."""
    codes = [child.process.returncode for child in children]
    failed = next((n for n, code in enumerate(codes) if code > 0), None)
    if failed is None:
        return 0
    if failed > 0 and codes[0] <= 0:  # the first speaks for itself
        print(_last_line(children[failed].log), file=sys.stderr)
    return codes[failed]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "a process failed without a word"


def _line(child: Child, why: str, workdir: Path) -> str:
    """One line on a lost process: which, and what is saved."""
    count = child.place.processes
    named = lost_in(child.log.read_text(errors="replace"))
    index = child.place.process if named is None else named
    which = f"the process on {socket.gethostname()}" if index is None else f"process {index}"
    which += f" of {count}" if count else ""
    why = "it left, or gave no sign" if named is not None and named != child.place.process else why
    return f"{which} was lost ({why}); {saved_in(workdir)}; run the same command to go on"


def lost_in(log: str) -> int | None:
    """Which process the runtime's last words call lost; None where they name none."""
    for silent_or_left in (r"unhealthy[^\n]*\n", r"The first task at the barrier: "):
        if found := re.search(silent_or_left + r"(?:\S*task:)?(\d+)", log):
            return int(found.group(1))
    # Process 0 answers everybody's heartbeats, and no longer does.
    return 0 if re.search(r"the leader task|DEADLINE_EXCEEDED[^$]*/Heartbeat", log) else None


def saved_in(workdir: Path) -> str:
    """What the newest complete checkpoint under a work directory is."""
    step = newest_step(workdir)
    if step is None:
        return f"nothing is saved in {workdir}"
    return f"step {step.name} is saved in {step.parent.parent}"
