"""``dyncomp launch``: hands a run to a scheduler, or prints what the scheduler would get."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, split_overrides, workdir_flag
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Write the files and commands that a scheduler takes for a run, and submit them. A run that was stopped after "
        "saving (exit code 75) is started again by the scheduler."
    )
    example = (
        "dyncomp launch tutel_paper --engine jobset --machine v5e:16x16 --image registry/me/dyncomp "
        "--storage checkpoints:/data --dry-run"
    )
    parser = command(commands, "launch", _main, about, example)
    parser.add_argument("config", help="a shipped name or a path")
    workdir_flag(parser, "runs/CONFIG, or CONFIG in the storage")
    engine_flags(parser, required=True)
    json_flag(parser)


def engine_flags(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the flags that say where and how a scheduler runs it; `sweep` has them too."""
    group = parser.add_argument_group("scheduler")
    flag = group.add_argument
    flag("--engine", required=required, help="slurm, submitit, jobset, xpk or sky")
    flag("--machine", default="cpu", help="such as cpu:4, h100:2x8 or v5e:4x4 (default: cpu)")
    flag("--name", help="of the job (default: the config's)")
    flag("--dry-run", action="store_true", help="print files and commands; submit nothing")
    flag("--partition", help="slurm, submitit: the queue")
    flag("--minutes", type=int, help="slurm, submitit: time limit of a job (default: a day)")
    flag(
        *("--sbatch",),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="slurm, submitit: a further option of sbatch, as in account=me; may be given more than once",
    )
    flag("--image", help="jobset, xpk, sky: a container image with dyncomp in it")
    flag(
        *("--storage",),
        metavar="SOURCE:PATH",
        help="jobset: a volume claim, xpk: an attached storage, sky: a bucket; and where the job sees it",
    )
    flag("--cluster", help="xpk: the cluster")
    flag("--queue", help="jobset: a local queue of Kueue")
    flag(
        *("--max-restarts",),
        type=int,
        metavar="N",
        help="jobset, xpk, sky: after failures (default: 3)",
    )


def _main(args: argparse.Namespace) -> None:
    place = workdir(args, Path(args.config).stem)
    overrides = [f"--gin.{override}" for override in args.overrides]
    point = ["run", args.config, "--workdir", str(place), "--no-progress", *overrides]
    launch(args, [point], place)


def workdir(args: argparse.Namespace, name: str) -> Path:
    """``--workdir``, or the folder ``name`` in the storage or below ``runs``."""
    if args.workdir:
        return Path(args.workdir)
    if not args.storage:
        return Path("runs") / name
    from dyncomp.launch import Storage

    return Path(Storage.parse(args.storage).path) / name


def launch(
    args: argparse.Namespace,
    points: Sequence[Sequence[str]],
    place: Path,
    at_once: int | None = None,
) -> None:
    """Submits points of one config, or prints them.

    Args:
      args: with the flags of `engine_flags`.
      points: arguments of ``dyncomp`` for each.
      place: work directory of all.
      at_once: points that may run at a time; None for no limit.
    """
    from dyncomp import config
    from dyncomp import launch as library
    from dyncomp.launch.job import name_of

    machine = library.Machine.parse(args.machine)
    given = {
        **{field: getattr(args, field) for field in FIELDS},
        "sbatch": dict(_pair(text) for text in args.sbatch),
        "storage": library.Storage.parse(args.storage) if args.storage else None,
        "at_once": at_once,
    }
    options = library.check(args.engine, machine, given)
    name = args.name or name_of(Path(args.config).stem)
    job = library.Job(name=name, points=points, workdir=place, machine=machine, **options)
    for point in points:
        library.check_mesh(config.load(args.config, split_overrides(point)[1]), machine)
    engine = library.engine(args.engine)
    submission = engine.write(job)
    _show(args, submission)
    if not args.dry_run:
        engine.submit(job, submission)


FIELDS = ("partition", "minutes", "image", "cluster", "queue", "max_restarts")
"""Flags that a job has a field for, as they are."""


def refuse_without_engine(args: argparse.Namespace) -> None:
    """Refuses flags of a scheduler where none is named.

    Raises:
      DyncompError: names the flag.
    """
    for field in (*FIELDS, "name", "sbatch", "storage", "dry_run"):
        if getattr(args, field):
            raise DyncompError(f"--{field.replace('_', '-')} is for schedulers: add --engine")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value) or name.startswith("-"):
        raise DyncompError(f"--sbatch {text!r}: write NAME=VALUE, as in account=me")
    return name, value


def _show(args: argparse.Namespace, submission: Any) -> None:
    if args.json:
        files = {str(path): text for path, text in submission.files.items()}
        print_json({"files": files, "commands": submission.commands, "dry_run": args.dry_run})
    elif args.dry_run:
        print(submission.text())
