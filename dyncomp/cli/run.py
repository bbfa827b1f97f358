"""``dyncomp run``: trains a config or resumes it, evaluates quality against compute, reports."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dyncomp.cli import job
from dyncomp.cli.executed import executed, said
from dyncomp.cli.output import command, json_flag, print_json, results, workdir_flag
from dyncomp.core.errors import PREEMPTED, DyncompError

TRACKERS = ("jsonl", "tensorboard", "wandb")


def add(commands: Any) -> None:
    """Adds the command."""
    about = (
        "Train (or resume) a config, evaluate quality against compute, and leave config.gin, metrics.jsonl, "
        "checkpoints, summary.json, a Pareto plot and report.html."
    )
    example = "dyncomp run quickstart --workdir runs/first --gin.STEPS=100"
    parser = command(commands, "run", _main, about, example)
    parser.add_argument("config", help="a shipped name or a path")
    workdir_flag(parser, "runs/CONFIG")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of under a minute; never evidence"
    )
    parser.add_argument(
        "--tracker",
        default="jsonl,tensorboard",
        metavar="NAMES",
        help=f"comma-separated out of {', '.join(TRACKERS)} (jsonl is always on)",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.add_argument(
        "--preempt-code",
        type=int,
        default=PREEMPTED,
        metavar="N",
        help="exit code, 1 to 255, when SIGTERM made it save and stop, or a process was lost (default: %(default)s)",
    )
    parser.add_argument(
        "--profile",
        default="",
        metavar="steps=A..B",
        help="trace these steps into WORKDIR/profile, for xprof or TensorBoard",
    )
    job.add_flags(parser)
    json_flag(parser)


def trackers(text: str) -> tuple[str, ...]:
    """Names of trackers out of a comma-separated text; ``jsonl`` is always among them.

    Raises:
      DyncompError: an unknown tracker.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise DyncompError(f"no tracker {name!r}: choose out of {', '.join(TRACKERS)}")
    return tuple(dict.fromkeys(["jsonl", *names]))


def _main(args: argparse.Namespace) -> int | None:
    if not 1 <= args.preempt_code <= 255:
        raise DyncompError(f"--preempt-code {args.preempt_code}: write a number from 1 to 255")
    workdir = Path(args.workdir or Path("runs") / Path(args.config).stem)
    place = job.place_of(args)
    if place is None and args.spawn is None:
        return _run(args, workdir)
    if job.supervised():
        assert place is not None
        with job.joined(place):
            return _run(args, workdir)
    from dyncomp.cli.supervise import spawned, supervise

    places = spawned(args.spawn) if place is None else [place]
    return supervise(args.words, places, workdir, args.preempt_code)


def _run(args: argparse.Namespace, workdir: Path) -> None:
    """Trains; then process 0 alone reports."""
    from dyncomp import config
    from dyncomp.parallel import processes

    chosen = trackers(args.tracker)
    run = config.load(args.config, args.overrides)
    summary = _train(
        run,
        workdir,
        config_text=config.operative(args.config, args.overrides),
        trackers=chosen,
        progress=not (args.no_progress or args.json),
        quick=args.quick,
        exit_code=args.preempt_code,
        profile=args.profile,
    )
    processes.leave()
    if processes.lead():
        _tell(args, run, workdir, summary)


def _tell(args: argparse.Namespace, run: Any, workdir: Path, summary: dict[str, Any]) -> None:
    """Writes the report and prints the results."""
    report = _report(workdir, summary)
    members = _members(run, summary)
    served = executed(members, workdir, quick=args.quick)
    if args.json:
        told = {"workdir": str(workdir), "report": str(report), "summary": summary}
        print_json({**told, "executed": served})
        return
    results(f"Results in {workdir}", summary.get("suite", {workdir.name: summary}))
    for name, record in served.items():
        line = said(members[name].task.headline, record)
        print(f"{name}: {line}" if name else line)
    print(f"report: {report.resolve()}")


def _members(run: Any, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Folder below the work directory ("" for itself) -> the run that trained there."""
    if "suite" in summary:
        return {name: run.runs[name] for name in summary["suite"]}
    return {"": run.selected() if hasattr(run, "selected") else run}


def _train(run: Any, workdir: Path, **options: Any) -> dict[str, Any]:
    from dyncomp.training.loop import train
    from dyncomp.training.suite import Suite, train_suite

    chosen = run.selected() if isinstance(run, Suite) else run
    _try_out(run.runs if chosen is None else {"": chosen}, workdir)
    if chosen is None:
        workdir.mkdir(parents=True, exist_ok=True)
        return train_suite(run, workdir, **options)
    return train(chosen, workdir, **options)


def _try_out(runs: Mapping[str, Any], workdir: Path) -> None:
    """Parts of a later run that do not fit together are told before the first one trains.

    Raises:
      DyncompError: naming the run.
    """
    from dyncomp.training.program import try_out

    for name, run in runs.items():
        if (workdir / name / "summary.json").exists():
            continue
        try:
            try_out(run)
        except DyncompError as error:
            raise DyncompError(f"{name}: {error}" if name else str(error)) from error


def _report(workdir: Path, summary: dict[str, Any]) -> Path:
    from dyncomp.report.load import read_run
    from dyncomp.report.page import write_report
    from dyncomp.report.pareto import write_pareto

    members = [workdir / name for name in summary.get("suite", {})] or [workdir]
    runs = [read_run(member, member.name) for member in members]
    write_pareto(runs, workdir / "pareto.svg")
    return write_report(members, workdir / "report.html")
