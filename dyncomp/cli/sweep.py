"""``dyncomp sweep``: a grid over bindings, as processes of ``dyncomp run`` here or jobs of a scheduler; resumable."""

import argparse
import ast
import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dyncomp.cli.launch import engine_flags, launch, refuse_without_engine, workdir
from dyncomp.cli.output import command, json_flag, print_json, table, workdir_flag
from dyncomp.core.errors import PREEMPTED, DyncompError, Preempted


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Run every point of a grid over bindings, here or, with --engine, as jobs of a scheduler; points that have "
        "finished are skipped."
    )
    example = "dyncomp sweep quickstart --grid training.Run.seed=0,1,2 --grid STEPS=100,200"
    parser = command(commands, "sweep", _main, about, example)
    parser.add_argument("config", help="a shipped name or a path")
    grid_help = "a binding and its values, comma-separated; may be given more than once"
    parser.add_argument(
        "--grid", action="append", required=True, metavar="NAME=A,B,..", help=grid_help
    )
    jobs_help = "runs at a time (default: 1 here, no limit under slurm and submitit)"
    parser.add_argument("--jobs", type=int, help=jobs_help)
    parser.add_argument("--quick", action="store_true", help="smoke runs")
    workdir_flag(parser, "runs/CONFIG_sweep")
    engine_flags(parser, required=False)
    json_flag(parser)


def parse_axis(text: str) -> tuple[str, list[str]]:
    """``NAME=A,B`` as name and values; commas inside brackets and quotes do not split.

    Raises:
      DyncompError: no ``=``, no value, or one value twice.
    """
    name, equals, values = text.partition("=")
    parts = _split(values)
    if not (equals and name.strip() and all(parts)):
        raise DyncompError(f"--grid {text!r}: write --grid NAME=A,B")
    if len(set(parts)) < len(parts):
        raise DyncompError(f"--grid {text!r}: a value stands twice, name each once")
    return name.strip(), parts


def grid(axes: Sequence[str]) -> list[dict[str, str]]:
    """Every point of the grid, the last axis fastest.

    Raises:
      DyncompError: an axis that can't be read, or two axes of one name.
    """
    parsed = [parse_axis(axis) for axis in axes]
    names = [name for name, _ in parsed]
    if len(set(names)) < len(names):
        raise DyncompError("--grid: a name stands twice, put its values into one --grid")
    return [dict(zip(names, p, strict=True)) for p in itertools.product(*(v for _, v in parsed))]


def folder(point: dict[str, str]) -> str:
    """A readable folder name of a point; different points of a grid get different names."""
    parts = (f"{name}={value}" for name, value in point.items())
    return re.sub(r"[^\w.=,+-]+", "-", "__".join(parts))


def _split(values: str) -> list[str]:
    parts: list[str] = []
    pending = ""
    for piece in values.split(","):
        pending = f"{pending},{piece}" if pending else piece
        if _closed(pending):
            parts.append(pending.strip())
            pending = ""
    return [*parts, pending.strip()] if pending else parts


def _closed(text: str) -> bool:
    """Whether no bracket or quote is open; names and references count as closed."""
    try:
        ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        opened = sum(text.count(c) for c in "([{") - sum(text.count(c) for c in ")]}")
        return opened <= 0 and text.count("'") % 2 == 0 and text.count('"') % 2 == 0
    return True


def _main(args: argparse.Namespace) -> int:
    from dyncomp import config

    if args.jobs is not None and args.jobs < 1:
        raise DyncompError(f"--jobs {args.jobs}: write 1 or more")
    if not args.engine:
        refuse_without_engine(args)
    points = grid(args.grid)
    for point in points:
        problems = config.check(args.config, [*args.overrides, *_bindings(point)])
        if problems:
            raise config.ConfigError(problems)
    place = workdir(args, f"{Path(args.config).stem}_sweep")
    folders = [place / folder(point) for point in points]
    if len(set(folders)) < len(folders):
        raise DyncompError("--grid: two points would share a folder; write their values apart")
    flags = [f"--gin.{o}" for o in args.overrides] + (["--quick"] if args.quick else [])
    runs = _Runs(args.config, flags, show=not args.json)
    if args.engine:
        launch(args, runs.open(points, folders), place, args.jobs)
        return 0
    rows = runs.all(points, folders, args.jobs or 1)
    place.mkdir(parents=True, exist_ok=True)
    (place / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    print_json(rows) if args.json else _show(place, rows)
    codes = {row["exit_code"] for row in rows}
    if PREEMPTED in codes:
        raise Preempted(f"stopped and saved in {place}; the same command continues", PREEMPTED)
    return int(codes != {0})


def _bindings(point: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in point.items()]


class _Runs:
    """Starts the processes; when one thread fails, all processes are asked to save and stop."""

    def __init__(self, config: str, flags: list[str], show: bool):
        self.config, self.flags, self.show = config, flags, show
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def all(self, points: list[dict], folders: list[Path], jobs: int) -> list[dict[str, Any]]:
        for point, folder in zip(points, folders, strict=True):
            self.finished(point, folder)
        with self.forward_sigterm(), ThreadPoolExecutor(jobs) as pool:
            try:
                return list(pool.map(self.one, points, folders))
            except BaseException:
                self.stop()
                raise

    def open(self, points: list[dict], folders: list[Path]) -> list[list[str]]:
        """Arguments of ``dyncomp`` for every point that has not finished.

        Raises:
          DyncompError: all have, or a folder holds a finished run of other arguments.
        """
        pairs = list(zip(points, folders, strict=True))
        found = [self.arguments(*pair) for pair in pairs if not self.finished(*pair)]
        if not found:
            raise DyncompError("every point has finished; nothing to launch")
        return found

    @contextlib.contextmanager
    def forward_sigterm(self) -> Iterator[None]:
        """A SIGTERM goes on to the runs, which save and stop."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self.stop())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def arguments(self, point: dict[str, str], folder: Path) -> list[str]:
        """Arguments of ``dyncomp`` for one point."""
        bindings = [f"--gin.{b}" for b in _bindings(point)]
        return [
            "run",
            self.config,
            "--workdir",
            str(folder),
            "--no-progress",
            *self.flags,
            *bindings,
        ]

    def finished(self, point: dict[str, str], folder: Path) -> bool:
        """Whether this very run has finished before.

        Raises:
          DyncompError: the folder holds a finished run of other arguments.
        """
        done = folder / "sweep.done"
        if not done.is_file():
            return False
        if json.loads(done.read_text()) != self.arguments(point, folder):
            raise DyncompError(
                f"{folder} holds a run with other settings: choose another --workdir"
            )
        return True

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def one(self, point: dict[str, str], folder: Path) -> dict[str, Any]:
        done = self.finished(point, folder)
        code = 0 if done else self._run(point, folder)
        status = "skipped" if done else "finished" if code == 0 else "failed"
        if self.show:
            print(
                f"{status}: {folder}" + (f" (see {folder / 'sweep.log'})" if code else ""),
                flush=True,
            )
        summary = _summary(folder)
        return {
            "point": point,
            "workdir": str(folder),
            "status": status,
            "exit_code": code,
            "summary": summary,
        }

    def _run(self, point: dict[str, str], folder: Path) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = self.arguments(point, folder)
        with (folder / "sweep.log").open("a") as log:
            with self.lock:
                if self.stopped:
                    return PREEMPTED
                process = subprocess.Popen(
                    [sys.executable, "-m", "dyncomp", *arguments], stdout=log, stderr=log
                )
                self.running.add(process)
            code = process.wait()
        with self.lock:
            self.running.discard(process)
        if code == 0:
            (folder / "sweep.done").write_text(json.dumps(arguments) + "\n")
        return code


def _summary(folder: Path) -> dict[str, Any] | None:
    for name in ("summary.json", "suite.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return None


def _show(workdir: Path, rows: list[dict[str, Any]]) -> None:
    figures = [_headlines(row["summary"] or {}) for row in rows]
    names = list(dict.fromkeys(name for found in figures for name in found))
    columns = (*rows[0]["point"], "status", *names)
    cells = [
        (*row["point"].values(), row["status"], *(found.get(n) for n in names))
        for row, found in zip(rows, figures, strict=True)
    ]
    table(f"Sweep in {workdir}", columns, cells)


def _headlines(summary: dict[str, Any]) -> dict[str, Any]:
    """Quality and compute of a run, or of each run of a suite."""
    from dyncomp.report.summary import figures_of

    found = {}
    for name, member in summary.get("suite", {"": summary}).items():
        figures = figures_of(member)
        for wanted in (member.get("headline"), "needed FLOPs"):
            if wanted in figures:
                found[f"{name} {wanted}".strip()] = figures[wanted]
    return found
