"""``dyncomp bench``: measurements against named references."""

import argparse
from typing import Any

from dyncomp.cli.output import command, json_flag


def add(commands: Any) -> None:
    """Adds the command."""
    about = "Measure one aspect against its reference; further arguments go to the bench."
    parser = command(commands, "bench", _main, about, "dyncomp bench ledger --json")
    parser.add_argument("name", help="name of the bench; `dyncomp bench list` prints them")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the bench")
    json_flag(parser)


def _main(args: argparse.Namespace) -> Any:
    from dyncomp import bench

    rest = [a for a in args.arguments if a != "--json"]
    return bench.main(args.name, rest, json=args.json or "--json" in args.arguments)
