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


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table; None is an empty cell, floats have four significant digits."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell(value) for value in row))
    Console().print(made)


def cell(value: Any) -> str:
    """A value as the text of a table cell, with rich's markup switched off."""
    from rich.markup import escape

    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, float) else str(value))


def scalars(summary: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers of a nested summary by dotted name."""
    found: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found
