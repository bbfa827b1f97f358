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
    json_flag(parser)


def _main(args: argparse.Namespace) -> None:
    from dyncomp import config
    from dyncomp.training.evaluate import evaluate_workdir

    result = evaluate_workdir(Path(args.workdir), loader=config.load, split=args.split)
    if args.json:
        print_json(result)
    else:
        results(f"{args.workdir} on {args.split}", {Path(args.workdir).resolve().name: result})
