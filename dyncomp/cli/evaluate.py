"""``dyncomp eval``: quality and compute of a saved run on one split."""

import argparse
from pathlib import Path
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, results

SPLITS = ("validation", "calibration", "test", "train")


def add(commands: Any) -> None:
    """Adds the command."""
    about = "Measure quality and compute of a finished or interrupted run on a split."
    parser = command(
        commands, "eval", _main, about, "dyncomp eval runs/quickstart/top_p --split test"
    )
    parser.add_argument("workdir", help="work directory of a run")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument(
        "--executed",
        action="store_true",
        help="of a network with exits or skipped blocks: also run it segment by segment, as it is served, and time it",
    )
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    from dyncomp import config
    from dyncomp.training.evaluate import Evaluator
    from dyncomp.training.restore import load

    workdir = Path(args.workdir)
    loaded = load(workdir, loader=config.load)
    result = Evaluator(loaded.run)(loaded.variables, args.split)
    if args.executed:
        from dyncomp.runtime.evaluate import executed_split

        result["executed"] = executed_split(loaded.run, loaded.variables, args.split)
    if args.json:
        print_json(result)
        return
    results(f"{args.workdir} on {args.split}", {workdir.resolve().name: result})
    if args.executed:
        from dyncomp.cli.executed import said

        print(said(loaded.run.task.headline, result["executed"]))
