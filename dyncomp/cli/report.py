"""``dyncomp report``: one self-contained HTML page over one or many runs."""

import argparse
from pathlib import Path
from typing import Any

from dyncomp.cli.output import command
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = "Write one self-contained HTML page: curves, Pareto fronts, decision pictures, tables."
    example = "dyncomp report runs/quickstart/* --out report.html"
    parser = command(commands, "report", _main, about, example)
    parser.add_argument("workdirs", nargs="+", help="work directories of runs")
    parser.add_argument("--out", default="report.html", help="the page (default: %(default)s)")


def _main(args: argparse.Namespace) -> None:
    workdirs = [Path(w) for w in args.workdirs]
    for workdir in workdirs:
        if not workdir.is_dir():
            raise DyncompError(f"{workdir} is no work directory: give the --workdir of a run")
    from dyncomp.report.page import write_report

    print(f"report: {write_report(workdirs, Path(args.out)).resolve()}")
