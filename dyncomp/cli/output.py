"""What every command shares: a described sub-command, tables, JSON."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def command(
    commands: Any,
    name: str,
    function: Callable[[argparse.Namespace], Any],
    about: str,
    example: str,
) -> argparse.ArgumentParser:
    """Adds a sub-command whose ``--help`` ends with an example."""
    made = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.set_defaults(function=function)
    return made


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--gin.NAME=VALUE`` out of the arguments: (the other arguments, the ``NAME=VALUE`` texts)."""
    prefix = "--gin."
    rest = [a for a in argv if not a.startswith(prefix)]
    return rest, [a.removeprefix(prefix) for a in argv if a.startswith(prefix)]


def json_flag(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def workdir_flag(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds ``--workdir``."""
    parser.add_argument(
        "--workdir", metavar="DIR", help=f"where the results go (default: {default})"
    )


def print_json(value: Any) -> None:
    """Prints JSON; what JSON does not know is printed as text."""
    print(json.dumps(value, indent=1, default=str))


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = ""
) -> None:
    """Prints a table: None is an empty cell, columns of numbers are set to the right.

    Args:
      title: stands above it.
      columns: heads.
      rows: cells; see `dyncomp.report.summary.cell` for how numbers look.
      note: stands below it.
    """
    from rich.console import Console
    from rich.table import Table

    rows = [list(row) for row in rows]
    made = Table()
    for n, column in enumerate(columns):
        numeric = any(isinstance(row[n], int | float) for row in rows)
        made.add_column(
            column, overflow="fold", justify="right" if numeric else "left", no_wrap=n == 0
        )
    for row in rows:
        made.add_row(*(_escaped(value) for value in row))
    console = Console()
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(made)
    if note:
        console.print(note, style="dim", highlight=False)


def _escaped(value: Any) -> str:
    """A cell's text with rich's markup switched off."""
    from rich.markup import escape

    from dyncomp.report.summary import cell

    return escape(cell(value))


FLOPS_NOTE = "FLOPs are per token or image. Needed: what the decisions require; executed: padding and masked work too."


def results(title: str, members: dict[str, dict[str, Any]]) -> None:
    """Prints the figures of runs side by side.

    Args:
      title: stands above the table.
      members: name of a run -> its summary.json, or what an evaluation returned.
    """
    from dyncomp.report.summary import figures_of

    found = {name: figures_of(summary) for name, summary in members.items()}
    labels: dict[str, str] = {}
    for summary in members.values():
        if headline := summary.get("headline"):
            better = "lower" if summary.get("minimize", True) else "higher"
            labels[headline] = f"{headline} ({better} is better)"
    # In the order of the run with most to say, so that a dense baseline does not push a line to the end.
    names = dict.fromkeys(n for f in sorted(found.values(), key=len, reverse=True) for n in f)
    rows = [(labels.get(n, n), *(figures.get(n) for figures in found.values())) for n in names]
    table(title, ("", *found), rows, FLOPS_NOTE if "needed FLOPs" in names else "")
